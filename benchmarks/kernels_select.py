"""The selection kernel on a GPU beside ``sdpa``: ``python benchmarks/kernels_select.py``.

"lists differ" is the share of queries whose list is not that of ``sdpa``: near-ties that rounding
decides, which the acceptance rule allows. ``python -m nsa.tools.bench --tune`` times other tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from side_by_side import side_by_side
from torch import Tensor

from nsa import NSAConfig
from nsa.backends import load
from nsa.backends.compiled.select.launch import select_forward
from nsa.backends.compiled.select.tiles import SelectTiles, select_tiles
from nsa.testing import make_inputs
from nsa.testing.selection import _sequence_faults

PAPER = NSAConfig(num_heads=64, num_kv_heads=4, head_dim=128)
SMALL = NSAConfig.preset("small")
CONFIGS = {
    "paper": PAPER,
    "small": SMALL,
    "192/128": NSAConfig.preset("paper"),
    "G 1": replace(PAPER, num_heads=4),
    "G 64": replace(PAPER, num_kv_heads=1),
    "n 64": replace(PAPER, num_selected=64),
    "n 5, no initial": replace(SMALL, num_selected=5, num_initial=0),
    "l 48, d 16": replace(PAPER, compress_block=48),
    "l 16, d 16": replace(PAPER, compress_block=16),
    "l 8, d 2, l' 24": replace(SMALL, compress_block=8, compress_stride=2, select_block=24),
}


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    dtype: torch.dtype
    packed: bool


CHECKS = [
    *(Check(name, torch.bfloat16, False) for name in CONFIGS),
    *(Check(name, torch.float32, False) for name in CONFIGS),
    Check("paper", torch.float16, False),
    *(Check(name, torch.bfloat16, True) for name in ("paper", "small", "G 64")),
    Check("paper", torch.float32, True),
]


def select(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    config: NSAConfig,
    cu_seqlens: Tensor | None = None,
    q_start: int = 0,
    tiles: SelectTiles | None = None,
) -> Tensor:
    return select_forward(q, k, lse, config, cu_seqlens, q_start=q_start, tiles=tiles)


def differ(a: Tensor, b: Tensor) -> float:
    """Fraction of the queries' lists that are not equal."""
    return (a != b).any(-1).float().mean().item()


def problem(
    config: NSAConfig, batch: int, length: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k_cmp and lse of a regular batch, made on the device."""
    generator = torch.Generator("cuda").manual_seed(0)
    N = config.num_compressed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

    q = normal(batch, length, config.num_heads, config.head_dim)
    k = normal(batch, N, config.num_kv_heads, config.head_dim)
    return q, k, load("sdpa").compressed_attention(q, k, k[..., :1], config)[1]


@torch.no_grad()
def check(case: Check) -> str:
    """Lists of a regular batch, from the middle of it, twice, and with tied scores; or packed."""
    sdpa, config = load("sdpa"), CONFIGS[case.name]
    title = f"{case.name:16s} {str(case.dtype)[6:]:9s}"
    if case.packed:
        lengths = (0, 700, 31, 1, 0, 1500, 64, 5, 7, 300)
        x = make_inputs(config, lengths=lengths, dtype=case.dtype, device="cuda", surplus=True)
        q, k, cu = x.q.detach(), x.compressed.k.detach(), x.cu_seqlens
        lse = sdpa.compressed_attention(q, k, k, config, cu)[1]
        want = sdpa.select_blocks(q, k, config, cu, lse=lse)
        return f"{title} packed: lists differ {differ(select(q, k, lse, config, cu), want):.4%}"
    T, middle = 2500, 2000
    q, k, lse = problem(config, 1, T, case.dtype)
    sizes = config.group, config.head_dim, config.num_selected, T
    tiles = select_tiles(case.dtype, *sizes, capability=torch.cuda.get_device_capability())
    chosen = select(q, k, lse, config, tiles=tiles)
    share = differ(chosen, sdpa.select_blocks(q, k, config, lse=lse))
    faults = _sequence_faults(q, k, chosen, config) or "none"
    tail = select(q[:, middle:], k, lse[:, middle:], config, q_start=middle, tiles=tiles)
    parts = {
        "from the middle": torch.equal(tail, chosen[:, middle:]),
        "twice": torch.equal(chosen, select(q, k, lse, config, tiles=tiles)),
    }
    zero = torch.zeros_like(q)
    lse = sdpa.compressed_attention(zero, k, k[..., :1], config)[1]
    last = select(zero, k, lse, config, tiles=tiles)[0, -1, 0].tolist()
    q_block, inner = (T - 1) // config.select_block, config.num_selected - config.num_local
    first = 1 - config.num_initial  # block 0 has no block before it: its score is the lower one
    if config.compress_block == config.compress_stride:
        first = 0
    parts["ties"] = last == [*range(first, first + inner), *range(q_block - 1, q_block + 1)]
    if inner >= q_block:
        parts["ties"] = last == [*range(q_block + 1), *[-1] * (config.num_selected - q_block - 1)]
    words = ", ".join(f"{name} {'ok' if ok else 'WRONG'}" for name, ok in parts.items())
    return f"{title} faults {faults}, lists differ {share:.4%}, {words}"


def main() -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    side_by_side(check, CHECKS)


if __name__ == "__main__":
    main()
