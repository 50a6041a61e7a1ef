"""What a kernel or a compiler raises that does not work, and how it is said in a line."""

from __future__ import annotations

import sys

import torch

from nsa.errors import NSAError

OUT_OF_MEMORY = "out of memory"
_NO_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "std::bad_alloc",
    "Storage size calculation overflowed",
)
"""What PyTorch says on a CPU."""


def failures() -> tuple[type[Exception], ...]:
    """What a kernel may raise that does not fit the problem or the machine."""
    found: list[type[Exception]] = [
        RuntimeError, NSAError, AssertionError, TypeError, ValueError, AttributeError, LookupError,
        MemoryError,
    ]  # fmt: skip
    triton = sys.modules.get("triton.errors")  # its own are not RuntimeErrors
    if triton is not None:
        found.append(triton.TritonError)
    return tuple(found)


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether an exception says that there is no memory for something, on whatever device."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or any(part in str(error) for part in _NO_MEMORY)


def one_line(error: BaseException) -> str:
    """An exception as its type and message; a lack of memory in its own words."""
    if is_lack_of_memory(error):
        return OUT_OF_MEMORY
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
