"""``torch.library.opcheck`` of the operators made of Triton kernels, in Triton's interpreter."""

from __future__ import annotations

import pytest

from tests.support.operator_samples import IN_TRITON, check, check_selection, problem

# torch 2.14's own opcheck asks tensors that are no leaves for their gradient
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
LAYOUTS = pytest.mark.parametrize("packed", [False, True], ids=["regular", "packed"])


@LAYOUTS
@pytest.mark.parametrize("name", IN_TRITON)
def test_opcheck(name: str, packed: bool) -> None:
    check(name, problem(packed, length=11))


@LAYOUTS
def test_opcheck_of_selection(packed: bool) -> None:
    check_selection(problem(packed))
