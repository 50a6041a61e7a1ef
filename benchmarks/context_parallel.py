"""One layer's attention across GPUs (context parallelism): time, memory, efficiency, traffic.

    torchrun --nproc-per-node 2 benchmarks/context_parallel.py --length 262144
    torchrun --nproc-per-node 4 benchmarks/context_parallel.py --length 262144 1048576
    torchrun --nproc-per-node 2 benchmarks/context_parallel.py --tiny        # on CPUs, by gloo

Heads 64/4:128, φ mean, everything between a layer's projections, forward and backward. First a
short batch is held to one GPU: the share of equal lists, and the difference of the output and of
every gradient, relative, which is rounding. Then, for each length and order of rows, medians over
iterations, the slowest rank of each:

- *local*: the same calls with every collective replaced by copies on the GPU itself; the rest of
  the time is the share of communication that nothing hides;
- *one GPU*: the whole batch as one process computes it, on every rank for itself, where it fits;
- *efficiency*: that time over ranks times the time across ranks;
- *peak*: GiB of one GPU, inputs and their gradients included;
- *wanted*: the share of all selection blocks that some query of one rank reads: fetching by block
  moves so much of what the all-gather moves.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nsa import KV, NSAConfig, resolve
from nsa.attention import Search, run, search
from nsa.backends.dispatch import Resolution, plan
from nsa.backends.protocol import Problem
from nsa.cached_attention import Projected
from nsa.compression import PHI, compress_both
from nsa.core.inputs import AttentionInputs
from nsa.distributed import Layout, context_traffic
from nsa.distributed.context import attention, transfers
from nsa.distributed.context.collectives import Pending
from nsa.settings import current_settings

SHORT = {"cuda": 8192, "cpu": 640}
"""Tokens of the batch that is held to one GPU."""
ORDERS = {"head-tail": Layout.head_tail, "contiguous": Layout.contiguous}
GIB = 2**30
NAMES = ("q", *(f"{name}.{part}" for name in ("compressed", "selected", "window") for part in "kv"))


@dataclass
class Bench:
    """What all measurements have in common."""

    config: NSAConfig
    device: torch.device
    dtype: torch.dtype
    iterations: int

    def __post_init__(self) -> None:
        phis = PHI[self.config.compression]
        self.phis = [
            phis(self.config, size, device=self.device, dtype=self.dtype)
            for size in (self.config.head_dim, self.config.dv)
        ]

    def phi(self, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return compress_both(*self.phis, k, v, cu_seqlens)

    def chosen(self, length: int, *, sharded: bool) -> Resolution:
        problem = Problem(self.config, self.device, self.dtype, length, False, True, sharded)
        return plan(problem, None, current_settings())

    def inputs(self, rows: int, seed: int) -> tuple[Projected, Tensor]:
        """Random, each with a gradient; and the gradient of the output."""
        config, made = self.config, torch.Generator(self.device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            where: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
            return torch.randn(1, rows, *shape, generator=made, **where)

        H, K, D, V = config.num_heads, config.num_kv_heads, config.head_dim, config.dv
        pairs = [KV(*(normal(K, size).requires_grad_() for size in (D, V))) for _ in range(3)]
        gates = normal(H, 3).sigmoid_().requires_grad_()
        return Projected(normal(H, D).requires_grad_(), *pairs, gates), normal(H, V)

    def across(self, layout: Layout, x: Projected) -> Tensor:
        chosen = self.chosen(layout.total, sharded=True)
        return attention.attend(
            layout, x, self.phi, chosen, self.config, gates_in_unit_interval=True
        )

    def alone(self, x: Projected) -> Tensor:
        inputs = AttentionInputs(x.q, KV(*self.phi(*x.tokens)), x.selected, x.window, x.gates)
        chosen = self.chosen(x.q.shape[1], sharded=False)
        return run(chosen, inputs, self.config, gates_in_unit_interval=True)

    def time(self, call: Callable[[], object]) -> float:
        """Median of the slowest rank, in milliseconds; all ranks begin together."""
        times = []
        for i in range(self.iterations + 2):
            self.wait()
            begin = time.perf_counter()
            call()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            taken = torch.tensor([1e3 * (time.perf_counter() - begin)], device=self.device)
            dist.all_reduce(taken, dist.ReduceOp.MAX)
            if i >= 2:
                times.append(taken.item())
        return statistics.median(times)

    def wait(self) -> None:
        dist.barrier()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> float:
        """Of the rank that has the most, in GiB; 0 on a CPU."""
        if self.device.type != "cuda":
            return 0.0
        most = torch.tensor([torch.cuda.max_memory_allocated(self.device)], device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return most.item() / GIB


def leaves(x: Projected) -> tuple[Tensor, ...]:
    return x.q, *x.tokens, *x.selected, *x.window, x.gates


def backward(out: Tensor, x: Projected, dout: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, leaves(x), dout)


@contextlib.contextmanager
def lists_of(module: Any) -> Iterator[list[Tensor]]:
    """The lists of every search inside."""
    found: list[Tensor] = []

    def watched(*args: Any, **options: Any) -> Search:
        result = search(*args, **options)
        found.append(result.block_idx)
        return result

    module.search = watched
    try:
        yield found
    finally:
        module.search = search


@contextlib.contextmanager
def without_links() -> Iterator[None]:
    """Collectives are copies on the device itself, of as many bytes."""

    def gather(x: Tensor, group: Any) -> Pending:
        ranks = dist.get_world_size(group)
        return Pending(None, x, x.expand(ranks, *x.shape).contiguous())

    def scatter(x: Tensor, group: Any) -> Pending:
        return Pending(None, x, x[dist.get_rank(group)].clone())

    def exchange(x: Tensor, sent: list[int], received: list[int], group: Any) -> Pending:
        result = x.new_zeros(sum(received))
        count = min(len(result), len(x))
        result[:count].copy_(x[:count])
        return Pending(None, x, result)

    kept = transfers.all_gather, transfers.reduce_scatter, transfers.all_to_all
    transfers.all_gather, transfers.reduce_scatter, transfers.all_to_all = gather, scatter, exchange
    try:
        yield
    finally:
        transfers.all_gather, transfers.reduce_scatter, transfers.all_to_all = kept


def everywhere(failed: bool, device: torch.device) -> bool:
    """Whether any rank failed."""
    flag = torch.tensor([float(failed)], device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag.item())


def say(*words: object) -> None:
    if dist.get_rank() == 0:
        print(*words, flush=True)


def check(bench: Bench, order: str) -> None:
    """A short batch, the same on every rank, against one GPU."""
    import nsa.attention

    T = SHORT[bench.device.type]
    layout = ORDERS[order](T, multiple=bench.config.select_share)
    whole, dout = bench.inputs(T, seed=0)
    with lists_of(nsa.attention) as lists:
        out = bench.alone(whole)
    grads = backward(out, whole, dout)

    def own(x: Tensor) -> Tensor:
        return layout.shard(x.detach())

    def pair(x: KV) -> KV:
        return KV(*(own(y).requires_grad_() for y in x))

    x = Projected(
        own(whole.q).requires_grad_(),
        *map(pair, (whole.tokens, whole.selected, whole.window)),
        own(whole.gates).requires_grad_(),
    )
    with lists_of(attention) as own_lists:
        mine = bench.across(layout, x)
    found = backward(mine, x, own(dout))
    equal = (torch.cat(own_lists, 1) == own(lists[0])).all(-1).float().mean()
    errors = {"lists": 1 - equal}
    for name, got, want in zip(
        ("out", *(f"d{name}" for name in NAMES), "dgates"),
        (mine, *found),
        (out, *grads),
        strict=True,
    ):
        want = own(want).float()  # noqa: PLW2901
        errors[name] = (got.float() - want).norm() / want.norm()
    worst = torch.stack([error.float() for error in errors.values()]).to(bench.device)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    told = ", ".join(f"{name} {x:.1e}" for name, x in zip(errors, worst.tolist(), strict=True))
    say(f"check, T = {T}, {order}: lists that differ and relative differences: {told}")


def wanted(bench: Bench, layout: Layout, x: Projected) -> float:
    """The share of all selection blocks that some query of this rank reads."""
    with lists_of(attention) as lists, torch.no_grad():
        bench.across(layout, x)
    blocks = -(-layout.total // bench.config.select_block)
    listed = torch.cat([y.flatten(0, 1).transpose(0, 1).flatten(1) for y in lists], 1).long()
    counts = torch.zeros(len(listed), blocks + 1, device=bench.device)
    counts.scatter_(1, listed.where(listed >= 0, blocks), 1.0)
    share = counts[:, :blocks].mean().reshape(1)
    dist.all_reduce(share)
    return share.item() / layout.size


def across_ranks(bench: Bench, order: str, T: int) -> float | None:
    """Prints all there is to know; the milliseconds of forward and backward."""
    layout = ORDERS[order](T, multiple=bench.config.select_share)
    bench.free()
    out_of_memory = ""
    found: dict[str, float] = {}
    try:
        x, dout = bench.inputs(layout.rows, seed=1 + dist.get_rank())
        found["forward"] = bench.time(lambda: bench.across(layout, x))
        bench.free()
        found["both"] = bench.time(lambda: backward(bench.across(layout, x), x, dout))
        found["peak"] = bench.peak()
        with without_links():
            found["local forward"] = bench.time(lambda: bench.across(layout, x))
            found["local both"] = bench.time(lambda: backward(bench.across(layout, x), x, dout))
        found["wanted"] = wanted(bench, layout, x)
    except torch.OutOfMemoryError as error:
        out_of_memory = str(error).partition("\n")[0]
    if everywhere(bool(out_of_memory), bench.device):
        say(f"T = {T}, {layout.size} ranks, {order}: does not fit: {out_of_memory}")
        return None
    traffic = context_traffic(layout, bench.config, element_size=bench.dtype.itemsize)
    moved = ", ".join(f"{name} {x.forward / 1e6:.1f}" for name, x in traffic.items())
    total = sum(x.forward + x.backward for x in traffic.values())
    hidden = {name: 1 - found[f"local {name}"] / found[name] for name in ("forward", "both")}
    say(
        f"T = {T}, {layout.size} ranks, {order}: forward {found['forward']:.1f} ms, forward and "
        f"backward {found['both']:.1f} ms, peak {found['peak']:.2f} GiB"
    )
    say(
        f"    local {found['local forward']:.1f} / {found['local both']:.1f} ms: share of "
        f"communication that nothing hides {hidden['forward']:.1%} / {hidden['both']:.1%}"
    )
    say(
        f"    received by one rank, MB forward: {moved}; forward and backward {total / 1e6:.1f} MB"
        f", {total / found['both'] / 1e6:.2f} GB/s of the whole time; "
        f"wanted {found['wanted']:.1%} of all blocks"
    )
    return found["both"]


def one_gpu(bench: Bench, T: int) -> float | None:
    bench.free()
    out_of_memory = ""
    forward = both = peak = 0.0
    try:
        x, dout = bench.inputs(T, seed=0)
        forward = bench.time(lambda: bench.alone(x))
        bench.free()
        both = bench.time(lambda: backward(bench.alone(x), x, dout))
        peak = bench.peak()
    except torch.OutOfMemoryError as error:
        out_of_memory = str(error).partition("\n")[0]
    if everywhere(bool(out_of_memory), bench.device):
        say(f"T = {T}, one GPU: does not fit: {out_of_memory}")
        return None
    say(
        f"T = {T}, one GPU: forward {forward:.1f} ms, forward and backward {both:.1f} ms, peak "
        f"{peak:.2f} GiB"
    )
    return both


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--length", type=int, nargs="+", default=[262144])
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=list(ORDERS))
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--timeout", type=float, default=300, help="seconds of a collective")
    parser.add_argument("--no-one-gpu", action="store_true", help="leave the baseline out")
    parser.add_argument("--tiny", action="store_true", help="a small problem on CPUs")
    parser.add_argument("--share", type=int, default=1, help="select_share")
    parser.add_argument("--regions", type=int, nargs=2, help="select_regions")
    args = parser.parse_args()
    options: dict[str, Any] = {"compression": "mean", "select_share": args.share}
    options["select_regions"] = None if args.regions is None else tuple(args.regions)
    timeout = timedelta(seconds=args.timeout)
    if args.tiny:
        device, dtype = torch.device("cpu"), torch.float32
        torch.set_num_threads(1)
        dist.init_process_group("gloo", timeout=timeout)
        config, lengths = NSAConfig.preset("tiny", **options), [1024]
    else:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        dtype = torch.bfloat16
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=timeout, device_id=device)
        config, lengths = NSAConfig(**options), args.length
    bench = Bench(config, device, dtype, args.iterations)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    found = resolve(
        config,
        device=device,
        dtype=dtype,
        length=max(lengths),
        packed=False,
        needs_grad=True,
        sharded=True,
    )
    say(f"{dist.get_world_size()} × {name}, torch {torch.__version__}, {dtype}, {found}")
    say(config)
    try:
        for order in args.orders:
            check(bench, order)
        for T in lengths:
            times = {order: across_ranks(bench, order, T) for order in args.orders}
            alone = None if args.no_one_gpu else one_gpu(bench, T)
            for order, both in times.items():
                if alone is not None and both is not None:
                    share = alone / both / dist.get_world_size()
                    say(f"T = {T}, {order}: efficiency against one GPU {share:.2f}")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
