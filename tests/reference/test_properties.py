"""What `nsa.reference` promises beyond its values: causality, dtypes, layouts, independence."""

import ast
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa import reference
from nsa.config import KV, NSAConfig
from nsa.reference import selection
from tests.support import numpy_oracle as oracle
from tests.support.reference_cases import Case, cases

FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
EXAMPLES = settings(max_examples=max(40, settings.default.max_examples))

CONFIG = NSAConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    value_dim=6,
    compress_block=4,
    compress_stride=2,
    select_block=8,
    num_selected=3,
    num_initial=1,
    num_local=1,
    window=7,
    compression="mean",
    rope_theta=None,
)
LENGTH = 45


def run_from_tokens(tokens, weights, case):
    """φ, selection and attention of q, gates and the k and v of the branches, in that order."""
    q, gates, *kv = tokens
    compressed = KV(
        *(
            reference.compress(x, weight, case.config, case.cu_seqlens)
            for x, weight in zip(kv[:2], weights, strict=True)
        )
    )
    return reference.nsa_attention(
        q, compressed, KV(*kv[2:4]), KV(*kv[4:]), gates, case.config, cu_seqlens=case.cu_seqlens
    )


def problem(case, dtype):
    """The inputs of `run_from_tokens`."""
    arrays = case.query(), case.gates(), *case.token_kv(), *case.token_kv(), *case.token_kv()
    weights = [
        {name: torch.from_numpy(w).to(dtype) for name, w in case.weights(size).items()}
        for size in (case.config.head_dim, case.config.dv)
    ]
    return [torch.from_numpy(array).to(dtype) for array in arrays], weights


@FLOATS
@EXAMPLES
@given(case=cases(kinds=("regular",)), data=st.data())
def test_a_token_changes_no_earlier_output(dtype, case: Case, data: st.DataObject):
    """Bit for bit, from the input of φ on."""
    tokens, weights = problem(case, dtype)
    before = run_from_tokens(tokens, weights, case)
    assert before.isfinite().all()
    s = data.draw(st.integers(0, case.tokens - 1), label="token")
    value = data.draw(st.sampled_from([0.0, 1.5, 1e30, -1e30]), label="value")
    for x in tokens:
        x[:, s] = value
    assert torch.equal(run_from_tokens(tokens, weights, case)[:, :s], before[:, :s])


@FLOATS
@EXAMPLES
@given(case=cases(kinds=("regular",)), data=st.data())
def test_the_largest_numbers_change_no_earlier_output(dtype, case: Case, data: st.DataObject):
    """Bit for bit, with all tokens from one on at the limit of the dtype, and their blocks."""
    q, gates, k_cmp, v_cmp, *kv = (
        torch.from_numpy(x).to(dtype)
        for x in (case.query(), case.gates(), *case.block_kv(), *case.token_kv())
    )

    def run():
        args = KV(k_cmp, v_cmp), KV(*kv), KV(*kv), gates, case.config
        return reference.nsa_attention(q, *args)

    before = run()
    s = data.draw(st.integers(0, case.tokens - 1), label="token")
    value = data.draw(st.sampled_from([1, -1]), label="sign") * torch.finfo(dtype).max
    for x in (q, gates, *kv):
        x[:, s:] = value
    for i, span in enumerate(oracle.compressed_spans(case.tokens, case.config)):
        if span[-1] >= s:
            k_cmp[:, i] = v_cmp[:, i] = value
    assert torch.equal(run()[:, :s], before[:, :s])


@FLOATS
@EXAMPLES
@given(case=cases(kinds=("packed",)), data=st.data())
def test_a_sequence_changes_no_other(dtype, case: Case, data: st.DataObject):
    """Bit for bit, whatever the other sequence holds."""
    tokens, weights = problem(case, dtype)
    before = run_from_tokens(tokens, weights, case)
    changed = data.draw(st.integers(0, len(case.lengths) - 1), label="sequence")
    value = data.draw(st.sampled_from([0.0, 1e30, torch.finfo(dtype).max]), label="value")
    start, stop = case.cu_seqlens[changed : changed + 2].tolist()
    for x in tokens:
        x[:, start:stop] = value
    after = run_from_tokens(tokens, weights, case)
    assert torch.equal(after[:, :start], before[:, :start])
    assert torch.equal(after[:, stop:], before[:, stop:])


def inputs(dtype):
    """q, compressed, selected, window, gates; made in `dtype`."""
    generator = torch.Generator().manual_seed(0)

    def random(rows, heads, size):
        return torch.randn(2, rows, heads, size, generator=generator).to(dtype)

    rows = CONFIG.num_compressed(LENGTH), LENGTH, LENGTH
    branches = [KV(random(n, 2, 4), random(n, 2, 6)) for n in rows]
    return random(LENGTH, 4, 4), *branches, random(LENGTH, 4, 3).sigmoid()


def run_steps(q, compressed, selected, window, block_idx):
    return {
        "compressed": reference.compressed_attention(q, *compressed, CONFIG),
        "selected": reference.selected_attention(q, *selected, block_idx, CONFIG),
        "window": reference.window_attention(q, *window, CONFIG),
    }


DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)


@DTYPES
@pytest.mark.parametrize("gates_fp32", [False, True])
def test_dtypes(dtype, gates_fp32):
    q, compressed, selected, window, gates = inputs(dtype)
    q.requires_grad_()
    block_idx = reference.select_blocks(q, compressed.k, CONFIG)
    assert block_idx.dtype == torch.int32
    for out, lse in run_steps(q, compressed, selected, window, block_idx).values():
        assert out.dtype == dtype
        assert out.requires_grad
        assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert not lse.requires_grad
    gates = gates.float() if gates_fp32 else gates
    out = reference.nsa_attention(q, compressed, selected, window, gates, CONFIG)
    assert out.dtype == dtype
    assert reference.compress(window.k, {}, CONFIG).dtype == dtype
    assert reference.apply_rope(window.k, 1e4).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_rounds_the_outputs_only(dtype):
    """Statistics and sums are fp32: an output is off by its own rounding and little more."""
    q, compressed, selected, window, gates = inputs(dtype)

    def float64(*tensors):
        return [x.double().numpy() for x in tensors]

    truth_idx = oracle.select_blocks(*float64(q, compressed.k), CONFIG)
    block_idx = reference.select_blocks(q, compressed.k, CONFIG)
    np.testing.assert_array_equal(block_idx.numpy(), truth_idx)
    truth = {
        "compressed": oracle.compressed_attention(*float64(q, *compressed), CONFIG),
        "selected": oracle.selected_attention(*float64(q, *selected), truth_idx, CONFIG),
        "window": oracle.window_attention(*float64(q, *window), CONFIG),
    }
    rounding = torch.finfo(dtype).eps / 2
    steps = run_steps(q, compressed, selected, window, block_idx)
    for branch, (out, lse) in steps.items():
        np.testing.assert_allclose(
            out.double().numpy(), truth[branch][0], rtol=rounding, atol=2e-6, err_msg=branch
        )
        np.testing.assert_allclose(lse.numpy(), truth[branch][1], rtol=1e-6, atol=2e-6)

    out = reference.nsa_attention(q, compressed, selected, window, gates, CONFIG)
    terms = np.moveaxis(gates.double().numpy(), -1, 0)[..., None] * [
        truth[branch][0] for branch in ("compressed", "selected", "window")
    ]
    error = np.abs(out.double().numpy() - terms.sum(0))
    assert (error <= 2 * rounding * np.abs(terms).sum(0) + 2e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"score_dtype": "fp8"}, {"select_regions": (1, 1)}],
    ids=["exact", "fp8", "regions"],
)
def test_scores_are_fp32(dtype, options):
    """Of half types, too: those of the same numbers."""
    q, compressed, *_ = inputs(dtype)
    config = dataclasses.replace(CONFIG, **options)
    given, wide = (q, compressed.k), (q.float(), compressed.k.float())
    scores = selection.selection_scores(*given, config)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, selection.selection_scores(*wide, config))
    assert torch.equal(scores, selection.selection_scores(*given, config, q_start=0))
    if config.select_regions is not None:
        _, lse = reference.compressed_attention(q, *compressed, config)
        regions = [selection.region_scores(*x, lse, config) for x in (given, wide)]
        assert torch.equal(*regions)
    lists = reference.select_blocks(*given, config)
    assert torch.equal(lists, reference.select_blocks(*wide, config))


def test_inputs_need_not_be_contiguous_and_stay_as_they_were():
    q, compressed, selected, window, gates = inputs(torch.float64)
    block_idx = reference.select_blocks(q, compressed.k, CONFIG)

    def strided(x):
        return x.transpose(1, 3).contiguous().transpose(1, 3)

    def run(change):
        args = change(q), *(KV(*map(change, kv)) for kv in (compressed, selected, window))
        copies = [x.clone() for kv in args[1:] for x in kv]
        selection = reference.select_blocks(args[0], args[1].k, CONFIG)
        steps = run_steps(*args, change(block_idx))
        whole = reference.nsa_attention(*args, change(gates), CONFIG)
        for x, copy in zip((x for kv in args[1:] for x in kv), copies, strict=True):
            assert torch.equal(x, copy)
        return [selection, whole, *(x for pair in steps.values() for x in pair)]

    for one, other in zip(run(torch.clone), run(strided), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


def imports_of_nsa(source, folder="nsa.reference"):
    """Modules and names of `nsa` outside `folder` that a file of that folder imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = folder.split(".")
            base = parents[: len(parents) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            if module == "nsa":
                found.update(f"nsa.{alias.name}" for alias in node.names)
            else:
                found.add(module)
    inside = {name for name in found if name == folder or name.startswith(f"{folder}.")}
    return {name for name in found - inside if name.split(".")[0] == "nsa"}


def test_reference_imports_nothing_of_the_library_but_config():
    files = sorted(Path(reference.__file__).parent.glob("**/*.py"))
    assert files
    for file in files:
        assert imports_of_nsa(file.read_text()) <= {"nsa.config"}, file.name


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch\nfrom nsa.config import KV\nfrom . import masks\n", {"nsa.config"}),
        ("from nsa.reference.masks import x", set()),
        ("from ..config import KV", {"nsa.config"}),
        ("from .. import blocks", {"nsa.blocks"}),
        ("def f():\n    from nsa import rope", {"nsa.rope"}),
        ("import nsa.compression as c", {"nsa.compression"}),
        ("from nsa.backends.sdpa.steps import run", {"nsa.backends.sdpa.steps"}),
    ],
)
def test_the_import_check_finds_what_it_looks_for(source, expected):
    assert imports_of_nsa(source) == expected


def test_a_row_that_leads_no_list_is_refused() -> None:
    config = dataclasses.replace(CONFIG, select_share=4)
    q, k = torch.zeros(1, 2, 4, 4), torch.zeros(1, 5, 2, 4)
    with pytest.raises(ValueError, match=r"^q_start: expected a multiple of 4, got 6$"):
        reference.select_blocks(q, k, config, q_start=6)
    assert reference.select_blocks(q, k, config, q_start=8).shape == (1, 2, 2, 3)
