"""What torch's `FlopCounterMode` counts of the operators, beside the analytical count."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.utils.flop_counter import FlopCounterMode

from nsa import NSAConfig, nsa_attention
from nsa.backends.compiled import ops
from nsa.backends.compiled.gated.op import gated_attention
from nsa.backends.sdpa.steps import window_attention
from nsa.backends.shared.select_op import select
from nsa.core.flops import (
    backward_flops,
    branch_pairs,
    compressed_pairs,
    forward_flops,
    search_pairs,
    selected_pairs,
    window_pairs,
)
from nsa.settings import use_settings
from nsa.testing.inputs import make_inputs

CONFIG = dataclasses.replace(NSAConfig.preset("tiny"), window=24)
H, D = CONFIG.num_heads, CONFIG.head_dim
BRANCHES = ("compressed", "selected", "window")
WHOLE = 103
"""The last fold of queries is full: (T - l) % d == d - 1."""


def forward(branch, *lengths):
    return forward_flops(H * branch_pairs(branch, CONFIG, lengths), D, D)


def backward(branch, *lengths):
    return backward_flops(H * branch_pairs(branch, CONFIG, lengths), D, D)


def selecting(*lengths):
    return 2 * D * H * branch_pairs("compressed", CONFIG, lengths)


def count(backend, *lengths, packed=False, grad=True):
    """Operations by operator, of a forward pass and of what its backward adds."""
    inputs = make_inputs(
        CONFIG, length=None if packed else lengths[0], lengths=lengths if packed else None
    )

    def call():
        return nsa_attention(
            inputs.q,
            inputs.compressed,
            inputs.selected,
            inputs.window,
            inputs.gates,
            CONFIG,
            cu_seqlens=inputs.cu_seqlens,
            max_seqlen=inputs.max_seqlen,
            backend=backend,
        )

    with FlopCounterMode(display=False) as counter:
        if grad:
            torch.autograd.grad(call(), inputs.leaves(), inputs.dout)
        else:
            with torch.inference_mode():
                call()
    counts = counter.get_flop_counts()["Global"]
    assert sum(counts.values()) == counter.get_total_flops()
    return {packet.__name__: flops for packet, flops in counts.items()}


@pytest.mark.parametrize("backend", ["sdpa", "compiled"])
def test_pure_pytorch(backend):
    """On a CPU the compressed branch is a kernel of PyTorch, for which torch has no formula."""
    assert count(backend, 100) == {
        "select_blocks": selecting(100),
        "sdpa_selected": forward("selected", 100),
        "sdpa_selected_backward": backward("selected", 100),
        "band": forward("window", 100),
        "band_backward": backward("window", 100),
    }


def test_a_window_at_a_position():
    """The last queries of a sequence see as many tokens as in the whole of it."""
    inputs = make_inputs(CONFIG, length=100)
    with FlopCounterMode(display=False) as counter:
        window_attention(inputs.q[:, 90:], *inputs.window, CONFIG, q_start=90)
    assert counter.get_total_flops() == forward("window", 100) - forward("window", 90)


def test_packed_sequences_of_pure_pytorch():
    """Selected and window as one sequence; the compressed one is folded, as wide as the longest."""
    found = count("sdpa", 40, 0, 60, packed=True)
    assert found["sdpa_selected"] == forward("selected", 100)
    rows, width = 100 // CONFIG.compress_stride, CONFIG.num_compressed(60)
    pairs = CONFIG.compress_stride * window_pairs(rows, width)
    folded = forward_flops(H * pairs, D, D)
    assert found["band"] == folded + forward("window", 100)
    assert folded >= forward("compressed", 40, 60)
    assert found["select_blocks"] == selecting(60, 40)


@pytest.mark.parametrize("backend", ["fa2-dense", "fa2-varlen"])
def test_fa2(backend):
    with use_settings(fa2_provider="math"):
        found = count(backend, WHOLE)
        longer = count(backend, WHOLE + 1)
    assert found == {
        "flash_attention_2": forward("compressed", WHOLE) + forward("window", WHOLE),
        "flash_attention_2_backward": backward("compressed", WHOLE) + backward("window", WHOLE),
        "select_blocks": selecting(WHOLE),
        "fa2_selected": forward("selected", WHOLE),
        "fa2_selected_backward": backward("selected", WHOLE),
    }
    # a fold that is not full counts as if it were
    exact = forward("compressed", WHOLE + 1) + forward("window", WHOLE + 1)
    missing = (CONFIG.compress_stride - 1) * CONFIG.num_compressed(WHOLE + 1)
    assert longer["flash_attention_2"] == exact + forward_flops(H * missing, D, D)


def test_packed_sequences_of_fa2():
    """The longest as often as it fits; rows of blocks past the last are counted, too."""
    with use_settings(fa2_provider="math"):
        found = count("fa2-varlen", 60, 0, 60, 30, packed=True)
    assert found["select_blocks"] == selecting(60, 60, 30)
    d, longest = CONFIG.compress_stride, CONFIG.num_compressed(60)
    times, rest = divmod(150 // d, longest)
    pairs = d * (times * window_pairs(longest, longest) + window_pairs(rest, longest))
    folded = forward_flops(H * pairs, D, D)
    assert folded >= forward("compressed", 60, 60, 30)
    assert found["flash_attention_2"] == folded + forward("window", 60, 60, 30)


def test_without_gradients():
    found = count("sdpa", 100, grad=False)
    assert set(found) == {"select_blocks", "sdpa_selected", "band"}


FRESH = """
import torch
from nsa import NSAConfig, nsa_attention
from nsa.testing.inputs import make_inputs
config = NSAConfig.preset("tiny")
x = make_inputs(config, length=100)
def call():
    nsa_attention(x.q, x.compressed, x.selected, x.window, x.gates, config, backend="sdpa")
"""


@pytest.mark.parametrize(
    "code",
    [
        """
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter, torch.inference_mode():
    call()  # defines the operators, which the counter has not heard of
""",
        """
call()
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    call()
""",
        """
with torch.inference_mode():
    call()
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter, torch.inference_mode():
    call()
""",
    ],
    ids=["counter first", "operators first", "operators first, without gradients"],
)
def test_in_a_fresh_process(code):
    root = Path(__file__).resolve().parents[2]
    code = FRESH + code + 'print(len(counter.get_flop_counts()["Global"]))'
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "3"


# The kernels' operators, which need no kernel to be counted


def meta(*shape, **options):
    return torch.empty(*shape, device="meta", **options)


def counted(call, leaves):
    with FlopCounterMode(display=False) as counter:
        out = call()[0]
        torch.autograd.grad(out, leaves, torch.empty_like(out))
    return {p.__name__: n for p, n in counter.get_flop_counts()["Global"].items()}


B, T, K, V = 2, 100, 2, 24
N = CONFIG.num_compressed(T)
KEY = CONFIG.key


@pytest.fixture
def qkv():
    q = meta(B, T, H, D).requires_grad_()
    return q, meta(B, T, K, D).requires_grad_(), meta(B, T, K, V).requires_grad_()


def both(name, pairs):
    pairs *= B * H
    return {name: forward_flops(pairs, D, V), f"{name}_backward": backward_flops(pairs, D, V)}


@pytest.mark.parametrize("first", [0, 37])
def test_the_branches_of_the_kernels(qkv, first):
    q, k, v = qkv
    found = counted(lambda: ops.window_attention(q, k, v, None, KEY, first), qkv)
    assert found == both("window_attention", window_pairs(T, CONFIG.window, first))
    call = (meta(B, T, K, 4, dtype=torch.int32), None, 1, KEY, first)
    found = counted(lambda: ops.selected_attention(q, k, v, *call), qkv)
    assert found == both("selected_attention", selected_pairs(T, CONFIG.select_block, 4, first))
    call = (*(None,) * 4, KEY, first)
    found = counted(lambda: ops.compressed_attention(q, k, v, *call), qkv)
    pairs = compressed_pairs(T, CONFIG.compress_block, CONFIG.compress_stride, first)
    assert found == both("compressed_attention", pairs)


def test_the_gated_sum_of_the_kernels(qkv):
    """Forward it computes two branches; backward all three."""
    q, k, v = qkv
    k_cmp, v_cmp = meta(B, N, K, D).requires_grad_(), meta(B, N, K, V).requires_grad_()
    gates = meta(B, T, H, 3).requires_grad_()
    config = dataclasses.replace(CONFIG, num_selected=4)
    call = (
        meta(B, T, H, V),
        meta(B, T, H),
        meta(B, T, K, 4, dtype=torch.int32),
        *(None,) * 4,
        1,
        config.key,
        1,
        0,
        0,
        True,
    )
    leaves = (q, k_cmp, v_cmp, k, v, gates)
    found = counted(lambda: gated_attention(q, k_cmp, v_cmp, k, v, k, v, gates, *call), leaves)
    pairs = {part: B * H * branch_pairs(part, config, (T,)) for part in BRANCHES}
    assert found == {
        "gated_attention": forward_flops(pairs["selected"] + pairs["window"], D, V),
        "gated_attention_backward": backward_flops(sum(pairs.values()), D, V),
    }


def test_symbolic_sizes_get_no_guard():
    """Inductor asks the formulas, too, while it traces."""
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    dynamic = StatelessSymbolicContext([DimDynamic.DYNAMIC] * 4)
    q, k = (
        mode.from_tensor(torch.empty(B, T, heads, D), symbolic_context=dynamic) for heads in (H, K)
    )
    before = len(env.guards)
    with FlopCounterMode(display=False) as counter:
        formula = counter.flop_registry[torch.ops.nsa.window_attention]
        found = formula(q, k, k, None, KEY, q.shape[1] - 76)
    assert isinstance(q.shape[1], torch.SymInt)
    assert found == forward_flops(B * H * window_pairs(T, CONFIG.window, T - 76), D, D)
    assert len(env.guards) == before


def test_products_counted_by_hand():
    """Ten pairs, D 3, V 5: q·k and p·v; then q·k, dQ and dK, and dO·v and dV."""
    assert forward_flops(10, 3, 5) == 10 * (6 + 10)
    assert backward_flops(10, 3, 5) == 10 * (3 * 6 + 2 * 10)


def search_by_hand(config, T):
    """Pairs that a selection multiplies, query by query and block by block."""
    l, d, size = config.compress_block, config.compress_stride, config.select_block  # noqa: E741
    r, k = config.select_regions or (1, 0)
    found = 0
    for t in range(0, T, config.select_share):
        ended = [i for i in range(T) if i * d + l - 1 <= t]
        if config.select_regions is None:
            found += len(ended)
            continue
        blocks = range(t // size + 1)
        forced = {j for j in blocks if j < config.num_initial or j > blocks[-1] - config.num_local}
        searched, ranked = set(blocks), []
        for region in range(len(blocks) // r + 1):
            of_region = set(range(region * r, region * r + r))
            whole = (region + 1) * r * size // d - 1 in ended
            found += whole  # has a key, which is scored
            if whole and not forced & of_region:
                ranked.append(of_region)
                searched -= of_region
        for of_region in ranked[max(0, len(ranked) - k) :]:
            searched |= of_region
        # compressed blocks that begin in a selection block, or reach into it
        reach = l // d - 1
        reached = (range(j * size // d - reach, (j + 1) * size // d) for j in searched)
        found += sum(i in ended for block in reached for i in block)
    return found


@pytest.mark.parametrize("initial", [1, 5])
@pytest.mark.parametrize("regions", [None, (2, 3), (3, 1)])
@pytest.mark.parametrize("share", [1, 4, 3])
def test_a_search_that_options_shorten(share, regions, initial):
    sizes = {"select_block": 12, "compress_block": 12, "compress_stride": 4, "num_initial": initial}
    sizes |= {"select_share": share, "select_regions": regions, "num_selected": 8, "num_local": 2}
    config = dataclasses.replace(CONFIG, **sizes)
    for T in (0, 1, 30, 100, 600):
        assert search_pairs(config, T) == search_by_hand(config, T), T
    first = 36
    assert search_pairs(config, 564, first) == search_pairs(config, 600) - search_pairs(config, 36)


@pytest.mark.parametrize("backend", ["compiled", "sdpa"])
def test_selection_counts_what_it_does(backend):
    """``sdpa`` scores everything all the same."""
    config = scored = dataclasses.replace(CONFIG, select_share=4, select_regions=(2, 3))
    if backend == "sdpa":
        scored = CONFIG
    q, k, lse = meta(B, T, H, D), meta(B, N, K, D), meta(B, T, H)
    with FlopCounterMode(display=False) as counter:
        select(backend, q, k, lse, config, None, None, 8)
    assert counter.get_total_flops() == 2 * D * B * H * search_pairs(scored, T, 8)


def test_pairs_of_a_part_of_the_queries():
    for part in (
        lambda T, first=0: window_pairs(T, 24, first),
        lambda T, first=0: compressed_pairs(T, 8, 4, first),
        lambda T, first=0: selected_pairs(T, 16, 4, first),
    ):
        assert part(30) + part(70, 30) == part(100)
        assert part(0, 50) == 0
