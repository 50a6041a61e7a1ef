"""The Triton kernels make good code for an H100, seen without one: they compile and fit.

Speed needs a GPU; that a kernel does not compile, spills, or waits after every matrix instruction
does not.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nsa import NSAConfig
from nsa.backends.compiled import tiling
from nsa.backends.compiled.selected.tiles import dq_dtype, tiles_for
from nsa.config import KV
from nsa.core.inputs import DecodeInputs
from tests.support.kernel_code import SM_90, Code, compile_launch, kernel_modules, recorded

FIGURES_OF = "3.6"
"""The version of triton whose code the figures below describe; torch 2.11 brings it."""


def _version() -> str:
    found = importlib.util.find_spec("triton") is not None
    return importlib.metadata.version("triton") if found else "none"


pytestmark = pytest.mark.skipif(
    not _version().startswith(f"{FIGURES_OF}."),
    reason=f"needs triton {FIGURES_OF}, to compile with; found {_version()}",
)

SHARED_BYTES = 227 * 1024
"""What a program may have on sm_90."""
SPILL_BYTES = 64
"""Of the stack, a thread: a little above what most tilings have, so that more is seen."""
SPILLS_IN_LOOPS = 4
"""Instructions that move spilled values in loops, likewise."""
SPILLING = {
    ("nsa_window_fwd", "wide"): (288, 16),  # two programs share a multiprocessor
    ("nsa_gated_bwd_dq", "wide"): (192, 4),  # so here, and no loop spills
    ("nsa_window_bwd_dkv", "wide"): (224, 96),  # a loop without masks and one with them
    ("nsa_window_bwd_dkv", "small"): (64, 8),
    ("nsa_selected_bwd_dkv", "paper"): (248, 22),  # 8.7 ms against 11.6 with eight warps
    ("nsa_selected_bwd_dq", "paper, shared"): (128, 28),  # untuned
}
"""What else some kernels may spill, since they were faster so on an H100, or since nobody has tuned
the shape."""
PAPER, WIDE, SMALL = (64, 4, 192, 128), (64, 4, 128, 128), (12, 2, 64, 64)
EIGHTY, GROUPS = (64, 4, 80, 80), (32, 8, 128, 128)
SHAPES = {"paper": PAPER, "wide": WIDE, "small": SMALL, "eighty": EIGHTY, "groups": GROUPS}
"""Hq, Hkv, Dk, Dv."""
SERIALIZED = {("nsa_window_fwd", "wide")}
"""With heads of 128 the window's forward has 128 registers, so that two programs share a
multiprocessor: 3.1 ms against 3.9 at T = 65536, although its matrix instructions wait."""
STEPS = (
    "window",
    "window backward",
    "compressed",
    "compressed backward",
    "select",
    "select, fp8",
    "select, every option",
    "selected",
    "selected backward",
    "selected, shared lists",
    "selected, in order",
    "gated",
    "gated backward",
    "gated backward, any gates",
    "decode",
    "decode, eight tokens and every option",
)
OPTIONS, SHARED = STEPS[5:7], STEPS[9]
SLOW = {
    # the kernels of the other steps, with other flags
    "paper": (*STEPS[:4], *OPTIONS, *STEPS[9:]),
    "wide": (STEPS[3], STEPS[13], STEPS[-1]),
    "small": tuple(step for step in STEPS if step != STEPS[8]),
    "eighty": tuple(step for step in STEPS if step != "window backward"),
    "groups": STEPS[8:11],
}
SMALLER = {(8, 0): 163, (8, 9): 99}
"""The KiB of shared memory that a program may have, by compute capability."""
FAST = ((8, 9), "wide", "window backward")
MAX_ARGUMENTS = 30
"""Of a kernel, compile-time constants apart; a tuple counts as one."""


def launch(
    shape: tuple[int, int, int, int], step: str, capability: tuple[int, int] = SM_90
) -> list[Code]:
    """Compiles what one step launches, in bf16, at T = 8192."""
    from nsa.backends.compiled.decode import launch as decode
    from nsa.backends.compiled.gated import launch as gated
    from nsa.backends.compiled.select import launch as select
    from nsa.backends.compiled.selected import launch as selected
    from nsa.backends.compiled.window import launch as window
    from nsa.backends.compiled.window.bounds import Blocks

    H, K, D, V = shape
    T, N = 8192, 511

    def empty(*size: int) -> Tensor:
        return torch.empty(1, *size, dtype=torch.bfloat16)

    q, out, dout = empty(T, H, D), empty(T, H, V), empty(T, H, V)
    k, v, k_cmp, v_cmp = empty(T, K, D), empty(T, K, V), empty(N, K, D), empty(N, K, V)
    lse = torch.empty(1, T, H)
    lists = torch.zeros(1, T, K, 16, dtype=torch.int32)
    scale = D**-0.5
    blocks = Blocks(32, 16)
    gates = empty(T, H, 3)
    ks, vs = gated.Branches(k_cmp, k, k), gated.Branches(v_cmp, v, v)
    layout = gated.Layout(blocks, 64, 512, scale)
    of_all = (gated.Branches(out, out, out), gated.Branches(lse, lse, lse), lists, layout)
    dtype = dq_dtype(q.dtype, D, V, H // K)
    chosen = {"start": None, "select_block": 64, "scale": scale}
    config = NSAConfig(num_heads=H, num_kv_heads=K, head_dim=D, value_dim=V, rope_theta=None)
    optional = replace(
        config,
        select_schedule=((1024, 8),),
        select_mass=0.8,
        select_share=4,
        select_regions=(4, 16),
        score_dtype="fp8",
    )
    band = {"window": 512, "start": None, "scale": scale}

    def one_step(S: int) -> DecodeInputs:
        def room(*size: int) -> KV:
            return KV(*(torch.empty(*size, K, x, dtype=torch.bfloat16) for x in (D, V)))

        table = torch.zeros(1, T // 64, dtype=torch.int32)
        caches = room(1, N), room(T // 64, 64), table, room(1, 512 + S - 1)
        position = torch.zeros(1, dtype=torch.int32)
        return DecodeInputs(empty(S, H, D), position, empty(S, H, 3), *caches)

    ordered = tiles_for(
        *(D, V, H // K),
        width=16,
        select_block=64,
        dtype=q.dtype,
        length=T,
        deterministic=True,
    )
    of_lists = replace(config, select_schedule=((1024, 8),), select_mass=0.8)
    steps: dict[str, Callable[[], object]] = {
        "window": lambda: window.window_forward(q, k, v, **band),
        "window backward": lambda: window.window_backward(dout, q, k, v, out, lse, **band),
        "compressed": lambda: window.window_forward(
            q, k_cmp, v_cmp, **{**band, "window": N}, blocks=blocks
        ),
        "compressed backward": lambda: window.window_backward(
            dout, q, k_cmp, v_cmp, out, lse, **{**band, "window": N}, blocks=blocks
        ),
        "select": lambda: select.select_forward(q, k_cmp, lse, config),
        "select, fp8": lambda: select.select_forward(
            q, k_cmp, lse, replace(config, score_dtype="fp8")
        ),
        "select, every option": lambda: select.select_forward(q, k_cmp, lse, optional),
        "selected": lambda: selected.selected_forward(q, k, v, lists, **chosen),
        "selected backward": lambda: selected.selected_backward(
            dout, q, k, v, out, lse, lists, **chosen
        ),
        "selected, shared lists": lambda: (
            selected.selected_forward(q, k, v, lists, **chosen, share=4),
            selected.selected_dq(dout, q, k, v, lse, lists, **chosen, out=out, share=4),
        ),
        "selected, in order": lambda: (
            selected.selected_dq(dout, q, k, v, lse, lists, **chosen, out=out, tiles=ordered.dq),
            selected.selected_dkv(*(dout, q, k, v, lse, lse, lists), **chosen, tiles=ordered.dkv),
        ),
        "gated": lambda: gated.gated_forward(q, ks, vs, gates, out, lists, layout),
        "gated backward": lambda: gated.gated_backward(
            dout, q, ks, vs, gates, *of_all, gates_in_unit_interval=True, dq_dtype=dtype
        ),
        "gated backward, any gates": lambda: gated.gated_backward(
            dout, q, ks, vs, gates, *of_all, gates_in_unit_interval=False, dq_dtype=dtype
        ),
        STEPS[-2]: lambda: decode.decode_attention(one_step(1), config),
        STEPS[-1]: lambda: decode.decode_attention(one_step(8), of_lists),
    }
    with recorded(*kernel_modules()) as launches:
        steps[step]()
    assert launches.calls
    return [compile_launch(*call, capability) for call in launches.calls]


@pytest.mark.parametrize(
    ("shape", "step"),
    [
        pytest.param(shape, step, marks=pytest.mark.slow if step in SLOW[shape] else ())
        for shape in SHAPES
        for step in STEPS
        if shape != "groups" or step.startswith("selected")
    ],
)
def test_code_for_an_h100(shape: str, step: str) -> None:
    for code in launch(SHAPES[shape], step):
        key = code.kernel, f"{shape}, shared" if step == SHARED else shape
        spilled, in_loops = SPILLING.get(key, (SPILL_BYTES, SPILLS_IN_LOOPS))
        assert code.kernel.startswith("nsa_"), code
        assert code.shared <= SHARED_BYTES, code
        assert code.spilled <= spilled, code
        assert code.spilled_in_loops <= in_loops, code
        assert code.serialized == ((code.kernel, shape) in SERIALIZED), code


@pytest.mark.parametrize(
    ("capability", "kib", "shape", "step"),
    [
        pytest.param(
            *(gpu, SMALLER[gpu], shape, step),
            marks=() if (gpu, shape, step) == FAST else pytest.mark.slow,
            id=f"{tiling.sm(gpu)}-{shape}-{step}",
        )
        for gpu in SMALLER
        for shape in ("wide", "small", "paper")
        for step in STEPS
    ],
)
def test_tiles_fit_gpus_with_less_shared_memory(
    capability: tuple[int, int], kib: int, shape: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which nobody has tuned them for: launches are tiled as on such a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tiling, "_capability", lambda index: capability)
    with torch.device("meta"):
        found = launch(SHAPES[shape], step, capability)
    assert {code.kernel: code.shared for code in found if code.shared > kib * 1024} == {}


def test_what_ptxas_complains_of_is_seen() -> None:
    """Few registers: spilled, and serialized."""
    from nsa.backends.compiled.window import launch as window
    from nsa.backends.compiled.window.tiles import Tiles

    q = torch.empty(1, 256, 16, 128, dtype=torch.bfloat16)
    k: Tensor = torch.empty(1, 256, 1, 128, dtype=torch.bfloat16)
    tiles = Tiles(128, 64, num_warps=8, num_stages=2, maxnreg=96)
    with recorded(window) as launches:
        window.window_forward(q, k, k, window=64, start=None, scale=1.0, tiles=tiles)
    (code,) = [compile_launch(*call) for call in launches.calls]
    assert code.spilled > SPILL_BYTES
    assert code.spilled_in_loops > SPILLS_IN_LOOPS
    assert code.serialized
    assert code.registers <= 96


@pytest.mark.parametrize(
    "step",
    [
        "gated",
        *(pytest.param(step, marks=pytest.mark.slow) for step in ("gated backward", "decode")),
    ],
)
def test_strides_of_one_compile(step: str) -> None:
    """To Triton, but not to its interpreter, an argument of 1 is a constant without a dtype."""
    assert launch((1, 1, 1, 1), step)


def test_kernels_take_few_arguments() -> None:
    from triton.runtime.jit import JITFunction

    everything = {name: x for module in kernel_modules() for name, x in vars(module).items()}
    kernels = {
        name: sum(not parameter.is_constexpr for parameter in x.params)
        for name, x in everything.items()
        if isinstance(x, JITFunction) and name.startswith("nsa_")
    }
    assert len(kernels) > 5
    assert {name: count for name, count in kernels.items() if count > MAX_ARGUMENTS} == {}
