"""The toolchain of ``torch.compile`` on this machine: compilers, caches, variables.

Nearly all of it is read from torch's inner modules: what a version of torch does not have is
:data:`UNKNOWN`, and nothing is imported before it is needed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from nsa.core.toolchain import INDUCTOR_DIR, TRITON_DIR, c_compiler, is_writable, triton_cache
from nsa.settings import foreign_variable
from nsa.tools.common.machine import CACHE_SWITCHES, INTERPRETER, OFF_SWITCHES, output_of

UNKNOWN = "not known to this version of torch"
_SECONDS = 3.0
"""As long as a folder is measured."""
_BREAKS = "graph_breaks,recompiles"
_VARIABLES = (
    ("TORCH_LOGS", _BREAKS, "print each graph break and recompile with its reason"),
    ("TORCH_LOGS", "output_code", "print the code that Inductor makes"),
    ("TORCH_COMPILE_DEBUG", "1", "write graphs and code to ./torch_compile_debug"),
    (INDUCTOR_DIR, "DIR", "where Inductor keeps its code"),
    (TRITON_DIR, "DIR", "where Triton keeps its kernels"),
    (CACHE_SWITCHES[0], "1", "use no cache: compile anew in every process"),
    (OFF_SWITCHES[0], "1", "compile nothing; torch.compile returns what it was given"),
    (OFF_SWITCHES[1], "1", "the same"),
    (INTERPRETER, "1", "run Triton kernels in Python, on the CPU: for tests"),
)
"""Variables that show or change more: the name, a value to give it, what that does."""


@dataclass(frozen=True, slots=True)
class Variable:
    """An environment variable that shows or changes what is compiled."""

    assignment: str
    """As it is written in a shell."""
    value: str | None
    """What it is now; None if it is unset."""
    meaning: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """A folder of compiled code."""

    path: str | None
    """None where nobody knows it."""
    files: int
    bytes: int
    complete: bool
    """Whether everything in it was counted; a large one takes too long."""
    note: str
    """What to know about it, or an empty string."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Toolchain:
    """What stands between a graph and code that runs."""

    torch: str
    triton: str | None
    off: str | None
    """The variable that turns ``torch.compile`` off; None where none does."""
    compiler: str
    """Whatever makes code for the device, in words."""
    refusal: str | None
    """Why Inductor cannot make code for the device; None where it can."""
    caches: str
    """"on", or what turns them off."""
    inductor_cache: Folder
    triton_cache: Folder | None
    """None without triton."""


def read_variables() -> tuple[Variable, ...]:
    """Read every variable of interest; do it first: torch sets some itself when it compiles."""
    return tuple(
        Variable(f"{name}={value}", foreign_variable(name), meaning)
        for name, value, meaning in _VARIABLES
    )


def collect_toolchain(
    device: torch.device, variables: tuple[Variable, ...], triton: str | None
) -> Toolchain:
    """Ask torch and the disk what makes code for a device."""
    values = {variable.assignment.partition("=")[0]: variable.value for variable in variables}
    compiler, refusal = _cpp_compiler() if device.type == "cpu" else _triton_compiler(triton)
    return Toolchain(
        torch=torch.__version__,
        triton=triton,
        off=next((f"{name}=1" for name in OFF_SWITCHES if values.get(name) == "1"), None),
        compiler=compiler,
        refusal=refusal,
        caches=_caches(),
        inductor_cache=_folder(values[INDUCTOR_DIR] or _inductor_cache(), INDUCTOR_DIR),
        triton_cache=None if triton is None else _folder(triton_cache(), TRITON_DIR),
    )


def _triton_compiler(triton: str | None) -> tuple[str, str | None]:
    """What makes code for a GPU, and why nothing does."""
    if triton is None or importlib.util.find_spec("triton") is None:
        return "none", "triton is not installed: pip install triton"
    compiler = c_compiler()
    if compiler is None:
        return "none", "triton found no C compiler: install gcc, or name one in the variable CC"
    return f"triton {triton} and {_version_line(compiler)}", None


def _cpp_compiler() -> tuple[str, str | None]:
    """What makes code for a CPU, and why nothing does."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler
    except ImportError:
        return UNKNOWN, None
    try:
        return _version_line(get_cpp_compiler()), None
    except InvalidCxxCompiler:
        return "none", "torch found no C++ compiler: install g++, or name one in the variable CXX"


def _version_line(compiler: str) -> str:
    """The first line that a compiler prints about itself; its name where it prints none."""
    return (output_of(compiler, "--version").splitlines() or [compiler])[0].strip()


def _caches() -> str:
    try:
        from torch._inductor import config
    except ImportError:
        return UNKNOWN
    if getattr(config, "force_disable_caches", False):
        named = [name for name in CACHE_SWITCHES if foreign_variable(name)]
        return f"off: {f'{named[0]} is set' if named else 'force_disable_caches is set'}"
    return "on" if getattr(config, "fx_graph_cache", True) else "off: fx_graph_cache is not set"


def _inductor_cache() -> str | None:
    try:
        # cache_dir() would make the folder and set the variable
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir
    except ImportError:
        return None
    return default_cache_dir()


def _folder(name: str | Path | None, variable: str) -> Folder:
    """Measure a folder; files that vanish while it is counted do not count."""
    if name is None:
        return Folder(path=None, files=0, bytes=0, complete=False, note=UNKNOWN)
    path = Path(name).absolute()
    files = size = 0
    complete, until = True, time.monotonic() + _SECONDS
    for place, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):
                size += os.stat(os.path.join(place, name), follow_symlinks=False).st_size
                files += 1
        if time.monotonic() > until:
            complete = False
            break
    note = _note(path, variable)
    return Folder(path=str(path), files=files, bytes=size, complete=complete, note=note)


def _note(path: Path, variable: str) -> str:
    if not is_writable(path):
        return f"cannot be written to: name another in {variable}"
    if Path(tempfile.gettempdir()).absolute() in path.parents:
        return f"a temporary place: {variable} names one that lasts"
    return ""
