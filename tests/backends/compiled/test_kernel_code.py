"""The Triton kernels make good code for an H100, seen without one: they compile and fit.

Speed needs a GPU; that a kernel does not compile, spills, or waits after every matrix instruction
does not.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support.kernel_code import Code, compile_launch, recorded

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, to compile with"
)

SHARED_BYTES = 227 * 1024
"""What a program may have on sm_90."""
SPILL_BYTES = 64
"""Of the stack, a thread: a little above what most tilings have, so that more is seen."""
SPILLS_IN_LOOPS = 4
"""Instructions that move spilled values in loops, likewise."""
SPILLING = {
    ("nsa_window_fwd", "paper"): (288, 16),  # two programs share a multiprocessor
    ("nsa_gated_bwd_dq", "paper"): (192, 4),  # so here, and no loop spills
    ("nsa_window_bwd_dkv", "paper"): (224, 96),  # a loop without masks and one with them
    ("nsa_window_bwd_dkv", "small"): (64, 8),
}
"""What else some kernels may spill, since they were faster so on an H100."""
PAPER, SMALL = (64, 4, 128), (12, 2, 64)
SERIALIZED = {"nsa_window_fwd"}
"""With heads of 128 the window's forward has 128 registers, so that two programs share a
multiprocessor: 3.1 ms against 3.9 at T = 65536, although its matrix instructions wait."""


def launch(shape: tuple[int, int, int], step: str) -> list[Code]:
    """Compiles what one step launches, in bf16, at T = 8192."""
    from nsa.backends.compiled import common as rows
    from nsa.backends.compiled.gated import launch as gated
    from nsa.backends.compiled.select import kernel as select
    from nsa.backends.compiled.selected import (
        bwd_dkv as selected_kv,
    )
    from nsa.backends.compiled.selected import (
        launch as selected,
    )
    from nsa.backends.compiled.selected import (
        lists as selected_lists,
    )
    from nsa.backends.compiled.window import launch as window
    from nsa.backends.compiled.window.bounds import Blocks

    H, K, D = shape
    T, N = 8192, 511
    q, dout = (torch.empty(1, T, H, D, dtype=torch.bfloat16) for _ in range(2))
    k = torch.empty(1, T, K, D, dtype=torch.bfloat16)
    k_cmp = torch.empty(1, N, K, D, dtype=torch.bfloat16)
    lse = torch.empty(1, T, H)
    lists = torch.zeros(1, T, K, 16, dtype=torch.int32)
    scale = D**-0.5
    blocks = Blocks(32, 16)
    gates = torch.empty(1, T, H, 3, dtype=torch.bfloat16)
    ks = gated.Branches(k_cmp, k, k)
    layout = gated.Layout(blocks, 64, 512, scale)
    of_all = (gated.Branches(q, q, q), gated.Branches(lse, lse, lse), lists, layout)
    dq_dtype = torch.float32 if D <= 64 else torch.bfloat16
    chosen = {"start": None, "select_block": 64, "scale": scale}
    geometry = {"compress_block": 32, "compress_stride": 16, "select_block": 64}
    counts = {"num_selected": 16, "num_initial": 1, "num_local": 2}
    band = {"window": 512, "start": None, "scale": scale}
    steps: dict[str, Callable[[], object]] = {
        "window": lambda: window.window_forward(q, k, k, **band),
        "window backward": lambda: window.window_backward(dout, q, k, k, q, lse, **band),
        "compressed": lambda: window.window_forward(
            q, k_cmp, k_cmp, **{**band, "window": N}, blocks=blocks
        ),
        "compressed backward": lambda: window.window_backward(
            dout, q, k_cmp, k_cmp, q, lse, **{**band, "window": N}, blocks=blocks
        ),
        "select": lambda: select.select_forward(
            q, k_cmp, lse, start=None, cmp_start=None, scale=scale, **geometry, **counts
        ),
        "selected": lambda: selected.selected_forward(q, k, k, lists, **chosen),
        "selected backward": lambda: selected.selected_backward(
            dout, q, k, k, q, lse, lists, **chosen
        ),
        "gated": lambda: gated.gated_forward(q, ks, ks, gates, q, lists, layout),
        "gated backward": lambda: gated.gated_backward(
            dout, q, ks, ks, gates, *of_all, gates_in_unit_interval=True, dq_dtype=dq_dtype
        ),
        "gated backward, any gates": lambda: gated.gated_backward(
            dout, q, ks, ks, gates, *of_all, gates_in_unit_interval=False, dq_dtype=dq_dtype
        ),
    }
    with recorded(gated, rows, select, selected, selected_kv, selected_lists, window) as launches:
        steps[step]()
    assert launches.calls
    return [compile_launch(*call) for call in launches.calls]


@pytest.mark.parametrize("shape", [PAPER, SMALL], ids=["paper", "small"])
@pytest.mark.parametrize(
    "step",
    [
        "window",
        "window backward",
        "compressed",
        "compressed backward",
        "select",
        "selected",
        "selected backward",
        "gated",
        "gated backward",
        pytest.param("gated backward, any gates", marks=pytest.mark.slow),
    ],
)
def test_code_for_an_h100(step: str, shape: tuple[int, int, int]) -> None:
    for code in launch(shape, step):
        key = code.kernel, "paper" if shape == PAPER else "small"
        spilled, in_loops = SPILLING.get(key, (SPILL_BYTES, SPILLS_IN_LOOPS))
        assert code.shared <= SHARED_BYTES, code
        assert code.spilled <= spilled, code
        assert code.spilled_in_loops <= in_loops, code
        expected = shape == PAPER and code.kernel in SERIALIZED
        assert code.serialized == expected, code


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


@pytest.mark.parametrize("step", ["gated", "gated backward"])
def test_strides_of_one_compile(step: str) -> None:
    """To Triton, but not to its interpreter, an argument of 1 is a constant without a dtype."""
    assert launch((1, 1, 1), step)
