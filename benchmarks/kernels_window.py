"""The window kernels on a GPU, held to the oracle's rule: ``python benchmarks/kernels_window.py``.

``python -m nsa.tools.bench --tune`` times other tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from side_by_side import side_by_side
from torch import Tensor

from nsa import NSAConfig
from nsa.backends.compiled.window.launch import window_backward, window_forward
from nsa.core.packing import packed_tokens
from nsa.testing import Inputs, expected, make_inputs, random_blocks

PAPER = NSAConfig(num_heads=64, num_kv_heads=4, head_dim=128)
SMALL = NSAConfig.preset("small")
CONFIGS = {
    "paper": PAPER,
    "small": SMALL,
    "192/128": NSAConfig.preset("paper", num_heads=16, num_kv_heads=1),
    "G 1, w 100": replace(PAPER, num_heads=2, num_kv_heads=2, window=100),
    "G 40, D 72": NSAConfig(num_heads=40, num_kv_heads=1, head_dim=72, value_dim=40),
    "D 256": NSAConfig(num_heads=8, num_kv_heads=1, head_dim=256),
    "w 1": replace(SMALL, window=1),
    "scale -0.1": replace(SMALL, scale=-0.1),
}


def arguments(x: Inputs) -> dict[str, Any]:
    """The keyword arguments that forward and backward share."""
    start = None
    if x.cu_seqlens is not None:
        tokens = packed_tokens(x.cu_seqlens, x.q.shape[1])
        start = tokens.seq_start.int()
    return {"window": x.config.window, "start": start, "scale": x.config.softmax_scale}


def run(x: Inputs) -> dict[str, Tensor]:
    q, k, v = (y.detach() for y in (x.q, *x.window))
    out, lse = window_forward(q, k, v, **arguments(x))
    dq, dk, dv = window_backward(x.dout, q, k, v, out, lse, **arguments(x))
    return {"out": out, "lse.window": lse, "dq": dq, "dwindow.k": dk, "dwindow.v": dv}


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    dtype: torch.dtype
    packed: bool


CHECKS = [
    *(Check(name, torch.bfloat16, packed) for name in CONFIGS for packed in (False, True)),
    *(Check(name, torch.float32, False) for name in ("paper", "small", "192/128", "G 40, D 72")),
    *(Check("paper", dtype, True) for dtype in (torch.float16, torch.float32)),
    Check("paper", torch.float16, False),
]


def check(case: Check) -> str:
    """The largest error over its bound, at most 1 by the accuracy rule, and whether it repeats."""
    cut: dict[str, Any] = {"length": 700}
    if case.packed:
        cut = {"lengths": (0, 300, 31, 1, 0, 370, 64, 5)}
    x = make_inputs(CONFIGS[case.name], **cut, dtype=case.dtype, device="cuda")
    gates = torch.zeros_like(x.gates)
    gates[..., 2] = 1.0
    x = replace(x, gates=gates, block_idx=random_blocks(x, 1))
    want, found, again = expected(x), run(x), run(x)
    ratios = {name: want[name].error(y) / want[name].bound for name, y in found.items()}
    worst = max(ratios, key=lambda name: ratios[name])
    same = all(torch.equal(found[name], again[name]) for name in found)
    return (
        f"{case.name:12s} {str(case.dtype)[6:]:9s} {'packed' if case.packed else 'regular':8s} "
        f"{'ok' if ratios[worst] <= 1 else 'WRONG'}, worst {worst} {ratios[worst]:.2f}, "
        f"twice {'ok' if same else 'WRONG'}"
    )


def main() -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    side_by_side(check, CHECKS)


if __name__ == "__main__":
    main()
