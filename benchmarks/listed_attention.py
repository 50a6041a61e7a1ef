"""MiniMax-M3's attention through ``attn_implementation="nsa"``: time and memory on a GPU.

    python benchmarks/listed_attention.py
    python benchmarks/listed_attention.py --lengths 8192 32768 131072

64 query heads on 4 of 128, 16 listed blocks of 128 keys for every query and group, bf16; lists at
random, and lists of which neighbouring queries share 65%. Medians; the peak is over the inputs and
is that of forward and backward.
"""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import torch
from kernels_selected import block_lists
from triton.testing import do_bench

from nsa.integrations.transformers.listed import listed_attention

HEADS, KV_HEADS, HEAD_DIM, BLOCK, LISTED = 64, 4, 128, 128, 16


def measure(length: int, share: float) -> str:
    """One row of the table."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(heads: int) -> torch.Tensor:
        shape = (1, heads, length, HEAD_DIM)
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    q, k, v = (normal(heads).requires_grad_() for heads in (HEADS, KV_HEADS, KV_HEADS))
    dout = normal(HEADS).transpose(1, 2)
    wanted = argparse.Namespace(
        num_selected=LISTED, kv_heads=KV_HEADS, share=share, select_block=BLOCK, select_share=1
    )
    lists = block_lists(length, wanted).transpose(1, 2)
    layer = SimpleNamespace(indexer=SimpleNamespace(block_size=BLOCK))

    def forward() -> torch.Tensor:
        return listed_attention(layer, q, k, v, block_indices=lists)[0]  # type: ignore[arg-type]

    def backward() -> None:
        torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)

    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = forward()
    backward()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    forward_ms, backward_ms = (
        do_bench(call, warmup=100, rep=500, return_mode="median") for call in (forward, backward)
    )
    return f"{forward_ms:10.2f}{backward_ms:10.2f}{peak:10.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lengths", nargs="+", type=int, default=[8192, 32768, 65536])
    parser.add_argument("--shares", nargs="+", type=float, default=[0.65, 0.0])
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"{'T':>8}{'shared':>8}{'forward':>10}{'backward':>10}{'peak GiB':>10}")
    for length in args.lengths:
        for share in args.shares:
            print(f"{length:8d}{share:8.0%}{measure(length, share)}", flush=True)


if __name__ == "__main__":
    main()
