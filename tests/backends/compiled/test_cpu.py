"""The ``compiled`` backend on a CPU: through Inductor, refused without a compiler."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from nsa import BackendUnavailable, NSAConfig, NSAttention, nsa_attention, resolve
from nsa.backends import dispatch
from nsa.backends.compiled import steps as compiled
from nsa.backends.protocol import Problem
from nsa.core import compile as core_compile
from nsa.core import toolchain
from nsa.settings import current_settings
from nsa.testing import Inputs, attention_parity, make_inputs, random_blocks, selection_faults

CONFIG = NSAConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    value_dim=6,
    compress_block=4,
    compress_stride=2,
    select_block=6,
    num_selected=4,
    num_local=1,
    window=7,
)


def problem(packed: bool, dtype: torch.dtype = torch.float32) -> Inputs:
    shape = {"lengths": (31, 0, 17, 1)} if packed else {"length": 50, "batch": 2}
    x = make_inputs(CONFIG, dtype=dtype, **shape)
    return replace(x, block_idx=random_blocks(x, 4))


def attend(x: Inputs, backend: str) -> torch.Tensor:
    return nsa_attention(
        x.q,
        x.compressed,
        x.selected,
        x.window,
        x.gates,
        CONFIG,
        cu_seqlens=x.cu_seqlens,
        max_seqlen=x.max_seqlen,
        block_idx=x.block_idx,
        backend=backend,
    )


@pytest.mark.parametrize("packed", [False, True], ids=["regular", "packed"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_parity_through_inductor(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_compile, "COMPILER", "inductor")
    x = problem(packed)
    rows = attention_parity("compiled", x)
    assert [row for row in rows if not row.ok] == []
    assert selection_faults("compiled", x) == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")  # Inductor's advice
@pytest.mark.parametrize(
    ("device", "backend"),
    [
        ("cpu", "sdpa"),
        *(pytest.param("cuda", b, marks=pytest.mark.gpu) for b in ("sdpa", "compiled")),
    ],
)
def test_gradients_of_a_layer_through_inductor(device: str, backend: str) -> None:
    """With donated buffers, torch's default: no saved tensor may share another's memory."""
    assert torch._functorch.config.donated_buffer
    torch._dynamo.reset()
    layer = NSAttention(24, CONFIG, backend=backend, device=device)
    x = torch.randn(2, 50, 24, device=device, requires_grad=True)
    dout = torch.randn_like(x)
    leaves = (x, *layer.parameters())
    want = torch.autograd.grad(layer(x), leaves, dout)
    compiled_layer = torch.compile(layer, fullgraph=True)
    got = torch.autograd.grad(compiled_layer(x), leaves, dout)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_two_backward_passes_through_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with buffer donation on before, which refuses the second."""
    monkeypatch.setattr(core_compile, "COMPILER", "aot_eager")
    torch._dynamo.reset()
    x = problem(False)
    # not by monkeypatch, whose undoing deletes the option
    with torch._functorch.config.patch(donated_buffer=True):
        out = attend(x, "compiled")
        first = torch.autograd.grad(out, x.leaves(), x.dout, retain_graph=True)
        for a, b in zip(first, torch.autograd.grad(out, x.leaves(), x.dout), strict=True):
            assert torch.equal(a, b)
    torch._dynamo.reset()


def test_the_layer_compiles_itself_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_compile, "COMPILER", "aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    layers = [NSAttention(24, CONFIG, backend="compiled") for _ in range(3)]
    plain = [NSAttention(24, CONFIG, backend="sdpa") for _ in range(3)]
    x = torch.randn(2, 50, 24)
    for ours, theirs in zip(layers, plain, strict=True):
        theirs.load_state_dict(ours.state_dict())
        torch.testing.assert_close(ours(x), theirs(x))
        assert ours.resolution is not None
        assert ours.resolution.backend == "compiled"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_without_a_compiler_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    toolchain.cpu_refusal.cache_clear()
    dispatch._resolve.cache_clear()
    with pytest.raises(BackendUnavailable, match=r"needs a C\+\+ compiler .* install g\+\+"):
        resolve(
            CONFIG,
            device="cpu",
            dtype=torch.float32,
            length=9,
            packed=False,
            needs_grad=True,
            backend="compiled",
        )
    toolchain.cpu_refusal.cache_clear()
    dispatch._resolve.cache_clear()


def test_what_a_cpu_leaves_to_sdpa_is_said() -> None:
    resolution = resolve(
        CONFIG,
        device="cpu",
        dtype=torch.float32,
        length=9,
        packed=False,
        needs_grad=True,
        backend="compiled",
    )
    assert set(resolution.per_branch.values()) == {"sdpa"}
    assert resolution.backend == "compiled"
    assert "selected on sdpa: on a CPU" in resolution.reason


@pytest.mark.parametrize(("capability", "refused"), [((8, 6), True), ((8, 9), False)])
def test_fp8_scores_need_a_gpu_that_has_fp8(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], refused: bool
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    config = replace(CONFIG, score_dtype="fp8")
    device = torch.device("cuda")
    problem = Problem(config, device, torch.bfloat16, 64, packed=False, needs_grad=True)
    reason = compiled.unavailable(problem, current_settings())
    expected = (
        "compiled needs sm89 or newer for score_dtype='fp8', got sm86: use score_dtype='input'"
    )
    assert reason == (expected if refused else None)


def test_the_schemas_need_no_triton() -> None:
    code = (
        "import sys, torch; sys.modules['triton'] = None\n"  # an import of it would raise
        "import nsa.backends.compiled.steps\n"
        "print(torch.ops.nsa.window_attention.default, torch.ops.nsa.selected_attention.default)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "nsa.window_attention.default nsa.selected_attention.default" in done.stdout


@pytest.mark.parametrize(
    "first", [pytest.param(False, marks=pytest.mark.slow), True], ids=["off, on", "on, off"]
)
def test_a_graph_is_not_used_under_another_autocast(
    monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    """Attention is never lowered; where autocast is off, nothing turns it off (see no_autocast)."""
    monkeypatch.setattr(core_compile, "COMPILER", "aot_eager")
    torch._dynamo.reset()
    x = problem(False)
    want = attend(x, "sdpa")
    for on in (first, not first):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            got = attend(x, "compiled")
        assert got.dtype == want.dtype
        assert torch.equal(got, want)
    torch._dynamo.reset()
