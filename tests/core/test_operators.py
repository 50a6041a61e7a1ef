"""Every operator of ``torch.ops.nsa`` keeps what torch asks of one: ``torch.library.opcheck``.

Those made of Triton kernels: tests/triton_interpreter/test_operators_opcheck.py, and on a GPU here.
"""

from __future__ import annotations

import pytest

from tests.support.operator_samples import (
    IN_TORCH,
    IN_TRITON,
    REGISTERED,
    check,
    check_selection,
    problem,
)

# torch 2.14's own opcheck asks tensors that are no leaves for their gradient
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
LAYOUTS = pytest.mark.parametrize("packed", [False, True], ids=["regular", "packed"])


def test_no_operator_is_without_a_sample() -> None:
    """A new one needs a row in tests/support/operator_samples.py."""
    assert REGISTERED == {*IN_TORCH, *IN_TRITON}


@LAYOUTS
@pytest.mark.parametrize("name", IN_TORCH)
def test_opcheck(name: str, packed: bool) -> None:
    check(name, problem(packed))


@pytest.mark.gpu
@LAYOUTS
@pytest.mark.parametrize("name", sorted(REGISTERED))
def test_opcheck_on_a_gpu(name: str, packed: bool) -> None:
    check(name, problem(packed, "cuda"))


@pytest.mark.gpu
@LAYOUTS
def test_opcheck_of_selection_on_a_gpu(packed: bool) -> None:
    check_selection(problem(packed, "cuda"))
