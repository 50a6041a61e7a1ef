"""Whole calls of ``compiled`` on a GPU, on lists at random and on lists that neighbours share.

    python benchmarks/whole_call.py
    python benchmarks/whole_call.py --lengths 8192 --rounds 5

What ``nsa_attention`` takes with its selection, forward and backward, φ not included. Random inputs
select lists that share little, as no trained model's do. For lists that share 65% and 86%, as deep
layers' of trained ones do, the selection runs all the same and other lists take the place of its
result. Each problem's heads and dtype are held to the oracle first; medians in milliseconds by
``bench``'s clock, over rounds in which the lists take turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median

import torch
from kernels_selected import block_lists
from torch import Tensor

from nsa import NSAConfig, nsa_attention
from nsa.backends import load
from nsa.testing import attention_parity, make_inputs, random_blocks
from nsa.testing.inputs import Inputs
from nsa.tools.bench.timing import cuda_clock, measure
from nsa.tools.common.problems import Trial, run_branch

STAYS = {"random": None, "65%": 0.5, "86%": 0.8}
"""Of lists by what neighbours share: how likely a random block stays for the next token."""


def check(config: NSAConfig) -> None:
    """The accuracy rule on a short problem of these heads."""
    few = replace(config, num_selected=4, window=99)
    x = make_inputs(few, length=700, dtype=torch.bfloat16, device="cuda")
    rows = attention_parity("compiled", replace(x, block_idx=random_blocks(x, 4)))
    wrong = [row for row in rows if not row.ok]
    if wrong:
        raise SystemExit(f"not within its bound: {wrong}")
    print(f"parity: at most {max(row.error / row.bound for row in rows):.2f} of the bound")


def calls(x: Inputs, stays: float | None) -> tuple[Callable[[], object], Callable[[], object]]:
    """Forward without a graph, and backward."""
    config, T = x.config, x.q.shape[1]
    steps = load("compiled")
    with torch.no_grad():
        _, lse = run_branch(steps, "compressed", x)
    lists = None
    if stays is not None:
        sizes = {"kv_heads": config.num_kv_heads, "num_selected": config.num_selected}
        sizes |= {"select_block": config.select_block, "select_share": 1}
        lists = block_lists(T, argparse.Namespace(share=stays, **sizes))
    record = (x.q, x.compressed, x.selected, x.window, x.gates)

    def attend() -> Tensor:
        return nsa_attention(*record, config, block_idx=lists, backend="compiled")

    def forward() -> object:
        with torch.no_grad():
            if lists is not None:
                run_branch(steps, "select", x, lse=lse)
            return attend()

    graph = attend()
    leaves, dout = x.leaves(), x.dout
    return forward, lambda: torch.autograd.grad(graph, leaves, dout, retain_graph=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    lengths = [4096, 8192, 16384, 32768, 65536]
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths)
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--lists", nargs="+", choices=list(STAYS), default=list(STAYS))
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    heads = {"num_heads": args.heads, "num_kv_heads": args.kv_heads}
    config = NSAConfig(**heads, head_dim=args.head_dim, rope_theta=None)
    device = torch.device("cuda", torch.cuda.current_device())
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {vars(args)}", flush=True)
    check(config)
    clock = cuda_clock(device)
    take = partial(measure, clock=clock, seconds=0.15, runs=5)
    print(f"| T | {' | '.join(args.lists)} |\n|---|{'---|' * len(args.lists)}", flush=True)
    for T in args.lengths:
        trial = Trial(
            config=config, device=device, dtype=torch.bfloat16, lengths=(T,), packed=False
        )
        x = trial.bare_inputs(native=True)
        pairs = {lists: calls(x, STAYS[lists]) for lists in args.lists}
        times: dict[str, list[tuple[float, ...]]] = {lists: [] for lists in args.lists}
        for _ in range(args.rounds):
            for lists, pair in pairs.items():
                times[lists].append(tuple(take(call).median * 1e3 for call in pair))
        cells = [
            " / ".join(f"{median(column):.3g}" for column in zip(*rounds, strict=True))
            for rounds in times.values()
        ]
        print(f"| {T} | {' | '.join(cells)} |", flush=True)
        del x, pairs
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
