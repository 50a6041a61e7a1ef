"""Inputs, tolerances and parity checks, shared by the tests, ``diagnose`` and ``bench``.

:mod:`nsa.testing.strategies` needs hypothesis and is imported by name only.
"""

from nsa.testing.inputs import Inputs, make_inputs, random_blocks
from nsa.testing.parity import ParityRow, attention_parity
from nsa.testing.selection import selection_faults
from nsa.testing.tolerances import Expected, expected

__all__ = [
    "Expected",
    "Inputs",
    "ParityRow",
    "attention_parity",
    "expected",
    "make_inputs",
    "random_blocks",
    "selection_faults",
]
