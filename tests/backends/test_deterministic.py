"""``torch.use_deterministic_algorithms``, and a row of a batch alone: the backends of a CPU.

The kernels of ``compiled`` have tests/triton_interpreter/test_deterministic.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from nsa import BackendUnavailable, NSAConfig, nsa_attention, resolve
from nsa.backends import dispatch, unavailable
from nsa.backends.fa2.calls import Call, FlashAttn
from nsa.backends.protocol import Problem
from nsa.testing import make_inputs, random_blocks, selection_faults
from tests.support.deterministic import deterministic, results, row, row_of, unequal

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


@pytest.mark.parametrize("length", [1, 33, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_a_row_alone_and_in_a_batch(backend: str, length: int) -> None:
    x = make_inputs(CONFIG, length=length, batch=2)
    assert unequal(row_of(results(x, backend), 1), results(row(x, 1), backend)) == []


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("shape", [{"length": 33, "batch": 2}, {"lengths": (17, 0, 16)}], ids=str)
def test_every_run_is_the_same(backend: str, shape: dict[str, Any]) -> None:
    x = make_inputs(CONFIG, **shape)
    x = replace(x, block_idx=random_blocks(x, 4))
    with deterministic():
        assert unequal(*(results(x, backend) for _ in range(3))) == []


@pytest.mark.parametrize("shape", [{"length": 33}, {"lengths": (17, 0, 16)}], ids=str)
def test_what_has_no_fixed_order_on_a_gpu_is_not_used(
    shape: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch refuses ``cumsum`` of floats there under the mode."""
    cumsum = torch.Tensor.cumsum

    def of_integers(x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        assert not x.is_floating_point()
        return cumsum(x, *args, **options)

    x = make_inputs(replace(CONFIG, select_mass=0.6), **shape)
    monkeypatch.setattr(torch.Tensor, "cumsum", of_integers)
    results(x, "sdpa")
    monkeypatch.undo()
    assert selection_faults("sdpa", x) == []


# Refusals

WITH_MASS = Problem(
    config=replace(CONFIG, select_mass=0.6),
    device=torch.device("cuda:0"),
    dtype=torch.float32,
    length=11,
    packed=False,
    needs_grad=True,
)


def test_the_oracle_says_what_it_cannot() -> None:
    message = (
        "reference needs torch.cumsum for select_mass, which is not deterministic on CUDA, and "
        "torch.use_deterministic_algorithms(True) is in force: use warn_only=True"
    )
    assert unavailable("reference", WITH_MASS) is None
    with deterministic():
        assert unavailable("reference", WITH_MASS) == message
        for fine in (CONFIG, replace(CONFIG, select_mass=1.0)):
            assert unavailable("reference", WITH_MASS._replace(config=fine)) is None
        on_a_cpu = WITH_MASS._replace(device=torch.device("cpu"))
        assert unavailable("reference", on_a_cpu) is None
    with deterministic(warn_only=True):
        assert unavailable("reference", WITH_MASS) is None


def test_a_request_is_refused_only_while_the_mode_is_in_force(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def of_the_oracle(name: str, *given: Any) -> str | None:  # the others would look for a GPU
        return unavailable(name, *given) if name == "reference" else None

    def requested() -> str:
        return resolve(**WITH_MASS._asdict(), backend="reference").backend

    monkeypatch.setattr(dispatch, "unavailable", of_the_oracle)
    assert requested() == "reference"
    with deterministic(), pytest.raises(BackendUnavailable, match="reference needs torch.cumsum"):
        requested()
    with deterministic(warn_only=True):
        assert requested() == "reference"
    assert requested() == "reference"


def test_flash_attn_is_told_of_the_mode() -> None:
    """torch's own FlashAttention-2 looks at it by itself."""
    told: list[bool] = []

    class Interface:
        def _flash_attn_backward(self, *args: Any, deterministic: bool, **options: Any) -> None:
            told.append(deterministic)

        _flash_attn_varlen_backward = _flash_attn_backward

    x, lse = torch.ones(1, 2, 1, 8), torch.ones(1, 2, 1)
    cu = torch.tensor([0, 2], dtype=torch.int32)
    regular = Call(scale=1.0, causal=True, max_q=2, max_k=2)
    for call in (regular, replace(regular, cu_q=cu, cu_k=cu)):
        for mode in (False, True):
            with deterministic(mode):
                FlashAttn(Interface()).backward(x, x, x, x, x, lse, call)
    assert told == [False, True, False, True]


def test_the_mode_may_change_between_calls_of_compiled_code() -> None:
    """A graph that was made without it does not run with it."""
    x = make_inputs(replace(CONFIG, select_mass=0.6), length=9)
    graphs = 0

    def counted(graph: torch.fx.GraphModule, example: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    def attend(*leaves: torch.Tensor) -> torch.Tensor:
        return x.with_leaves(leaves).attend(nsa_attention, backend="sdpa")

    run = torch.compile(attend, fullgraph=True, backend=counted)
    made = []
    for mode in (False, True, False, True):
        with deterministic(mode):
            run(*x.leaves())
        made.append(graphs)
    assert made == [1, 2, 2, 2]
