"""What has to be on the machine before ``torch.compile`` and Triton can make code there.

Each finds out in its own way, and fails with a traceback of its own in the middle of a call; these
ask beforehand in the same way, in milliseconds, and compile nothing.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
import tempfile
from functools import cache
from pathlib import Path

from nsa.settings import foreign_variable

INDUCTOR_DIR, TRITON_DIR, TRITON_HOME = "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TRITON_HOME"
INTERPRETED = foreign_variable("TRITON_INTERPRET") == "1"
"""Whether Triton kernels run on the CPU, in Triton's interpreter."""
_HEADERS = ("CPATH", "C_INCLUDE_PATH")
"""Where a C compiler looks for headers that no option names."""


@cache
def cpu_refusal() -> str | None:
    """Why Inductor cannot make code for this CPU, or None."""
    refusal = _inductor_cache_refusal()
    if refusal is not None:  # without the folder the imports below fail
        return refusal
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return (
            "compiled needs a C++ compiler on a CPU, and torch found none: install g++, or name "
            "one in the variable CXX"
        )
    return None


@cache
def gpu_refusal() -> str | None:
    """Why Triton and Inductor cannot make code for a GPU here, or None."""
    return _launcher_refusal() or _triton_cache_refusal() or _inductor_cache_refusal()


@cache
def has_triton() -> bool:
    """Whether Triton is there and can make code for a GPU."""
    return importlib.util.find_spec("triton") is not None and gpu_refusal() is None


def c_compiler() -> str | None:
    """The program that Triton builds the launchers of kernels with; None where it finds none."""
    named = foreign_variable("CC")
    if named is not None:
        return shutil.which(named)
    return shutil.which("gcc") or shutil.which("clang")


def _launcher_refusal() -> str | None:
    knobs = sys.modules.get("triton.knobs")
    if knobs is not None and getattr(getattr(knobs, "build", None), "impl", None) is not None:
        return None  # the user builds them in another way
    if c_compiler() is None:
        named = foreign_variable("CC")
        found = "found none" if named is None else f"CC={named!r} names no program"
        return (
            "compiled needs a C compiler on a GPU, with which triton builds the launchers of "
            f"kernels, and {found}: install gcc, or name a compiler in the variable CC"
        )
    headers = sysconfig.get_paths(_scheme())["include"]
    if not Path(headers, "Python.h").is_file() and not any(map(foreign_variable, _HEADERS)):
        return (
            "compiled needs Python's C headers on a GPU, with which triton builds the launchers of "
            f"kernels, and there is no Python.h in {headers}: install python3-dev (or -devel)"
        )
    return None


def _scheme() -> str:
    scheme = sysconfig.get_default_scheme()
    return "posix_prefix" if scheme == "posix_local" else scheme  # as triton does on Debian


def triton_cache() -> Path:
    """The folder where Triton keeps its kernels and launchers."""
    home = Path(foreign_variable(TRITON_HOME) or Path.home())
    return Path(foreign_variable(TRITON_DIR) or home / ".triton" / "cache").absolute()


def is_writable(folder: Path) -> bool:
    """Whether files can be made in a folder, or the folder can be made."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _triton_cache_refusal() -> str | None:
    folder = triton_cache()
    if is_writable(folder) or (folder.is_dir() and any(folder.iterdir())):
        return None  # one that was filled before it was made read-only serves
    return _cannot_write("triton keeps its kernels", folder, TRITON_DIR)


def _inductor_cache_refusal() -> str | None:
    try:  # torch names its default by a heavy import; that stands in the folder of temporary files
        folder = Path(foreign_variable(INDUCTOR_DIR) or tempfile.gettempdir()).absolute()
    except FileNotFoundError as error:
        return f"compiled needs a folder where torch.compile keeps its code: {error}"
    if is_writable(folder):
        return None
    return _cannot_write("torch.compile keeps its code", folder, INDUCTOR_DIR)


def _cannot_write(what: str, folder: Path, variable: str) -> str:
    return (
        f"compiled needs a folder where {what}, and {folder} cannot be written to: name another in "
        f"the variable {variable}"
    )
