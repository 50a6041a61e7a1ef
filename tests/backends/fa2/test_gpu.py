"""Is FlashAttention-2 really used? The kernels that ran, no host sync, few launches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from nsa import NSAConfig, nsa_attention
from nsa.backends import load
from nsa.backends.fa2 import selected as fa2_selected
from nsa.backends.fa2.selected import CHUNK_TOKENS
from nsa.backends.shared.workspace import kept_workspaces, release_workspaces
from nsa.testing import Inputs, make_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
    pytest.mark.filterwarnings("ignore:.*Profiler clears events"),
]

CONFIG = NSAConfig(num_heads=8, num_kv_heads=2, head_dim=64)
BRANCHES = ("compressed", "selected", "window")
OTHER_ATTENTION = ("fmha", "efficient", "softmax", "cudnn", "gemm", "xmma", "cutlass_80")
"""Parts of the names of kernels that would compute attention in another way."""


def problem(packed: bool, length: int = 4096) -> Inputs:
    shape = {"lengths": (length // 2, 0, length // 2 - 7, 7)} if packed else {"length": length}
    return make_inputs(CONFIG, dtype=torch.bfloat16, device="cuda", **shape)


def branch_call(backend: str, branch: str, x: Inputs) -> Callable[[], Tensor]:
    """Forward and backward of one branch, block lists given."""
    steps, cu, longest = load(backend), x.cu_seqlens, x.max_seqlen
    blocks = load("sdpa").select_blocks(x.q, x.compressed.k, CONFIG, cu, max_seqlen=longest)
    kv = getattr(x, branch)
    given = (x.q, *kv, blocks) if branch == "selected" else (x.q, *kv)
    step = getattr(steps, f"{branch}_attention")

    def call() -> Tensor:
        out, _ = step(*given, CONFIG, cu, max_seqlen=longest)
        torch.autograd.grad(out, (x.q, *kv), x.dout)
        return out

    return call


def kernels(call: Callable[[], Tensor]) -> Counter[str]:
    """How often each kernel ran."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    names = [event.name for event in trace.events() or [] if event.device_type.name == "CUDA"]
    return Counter(name for name in names if not name.startswith(("Memset", "Memcpy")))


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize(("backend", "packed"), [("fa2-dense", False), ("fa2-varlen", True)])
def test_flash_attention_2_computes_the_branch(backend: str, packed: bool, branch: str) -> None:
    ran = kernels(branch_call(backend, branch, problem(packed)))
    assert any("flash_fwd" in name for name in ran), ran
    assert any("flash_bwd" in name for name in ran), ran
    others = [
        name
        for name in ran
        if "flash" not in name and any(part in name.lower() for part in OTHER_ATTENTION)
    ]
    assert not others


@pytest.fixture
def sync_is_an_error() -> Iterator[Callable[[], None]]:
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("backend", "packed"),
    [("fa2-dense", False), ("fa2-varlen", False), ("fa2-varlen", True), ("sdpa", False)],
)
def test_no_host_sync(backend: str, packed: bool, sync_is_an_error: Callable[[], None]) -> None:
    x = problem(packed)

    def step() -> None:
        out = nsa_attention(
            x.q,
            x.compressed,
            x.selected,
            x.window,
            x.gates,
            CONFIG,
            cu_seqlens=x.cu_seqlens,
            max_seqlen=x.max_seqlen,
            backend=backend,
        )
        torch.autograd.grad(out, x.leaves(), x.dout)

    step()
    torch.cuda.synchronize()
    sync_is_an_error()
    step()


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")
def test_the_workspace_serves_any_mode_and_stream() -> None:
    x, y = problem(packed=True), problem(packed=True, length=2048)

    def step(x: Inputs) -> tuple[Tensor, ...]:
        cu = {"cu_seqlens": x.cu_seqlens, "max_seqlen": x.max_seqlen}
        kvs = (x.compressed, x.selected, x.window)
        out = nsa_attention(x.q, *kvs, x.gates, CONFIG, **cu, backend="fa2-varlen")
        return out, *torch.autograd.grad(out, x.leaves(), x.dout)

    def close(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> bool:
        """FA-2 adds dk and dv in no fixed order."""
        return all(
            torch.allclose(a, b, rtol=2e-2, atol=2e-2) for a, b in zip(got, want, strict=True)
        )

    want = step(x), step(y)
    release_workspaces()
    streams = [torch.cuda.Stream() for _ in range(3)]
    results = []
    torch.cuda.synchronize()
    for turn in range(4):
        for stream in streams:
            with torch.cuda.stream(stream):
                if turn == 0:
                    with torch.inference_mode():
                        x.attend(nsa_attention, backend="fa2-varlen")
                results += [(step(x), step(y))]
    torch.cuda.synchronize()
    assert len(kept_workspaces()) == len(streams)
    for got in results:
        assert all(close(*pair) for pair in zip(got, want, strict=True))


@pytest.mark.parametrize("branch", BRANCHES)
def test_launches_grow_by_chunks_only(branch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fa2_selected, "CHUNK_ELEMENTS", 1)  # chunks of the least length
    counts = {
        length: sum(kernels(branch_call("fa2-dense", branch, problem(False, length))).values())
        for length in (2 * CHUNK_TOKENS, 4 * CHUNK_TOKENS, 8 * CHUNK_TOKENS)
    }
    print(branch, counts)
    two, four, eight = counts.values()
    per_chunk = (four - two) / 2
    assert per_chunk == pytest.approx((eight - four) / 4, abs=1)
    assert per_chunk <= (180 if branch == "selected" else 0)
    assert two - 2 * per_chunk <= 60
