"""What Triton makes of a launch on a GPU that need not be there.

A launcher runs on CPU tensors with its kernels replaced by recorders; what they were called with is
compiled for sm_90 or another GPU, and ptxas says what the code needs. Nothing is run.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

SM_90 = (9, 0)
_OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
_NAMES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float32: "*fp32",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Code:
    """One compiled launch."""

    kernel: str
    registers: int
    spilled: int
    """Bytes of stack a thread."""
    spilled_in_loops: int
    """Instructions in loops that move what has been spilled."""
    shared: int
    """Bytes a program."""
    instructions: int
    """Of the machine code."""
    serialized: bool
    """Whether ptxas had to wait after every matrix instruction."""


@dataclass
class Launches:
    """The launches of one call."""

    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def recorder(self, kernel: Any) -> Any:
        """Stands in for a kernel."""
        calls = self.calls

        class Recorder:
            def __getitem__(self, grid: Any) -> Callable[..., None]:
                return lambda *args, **kwargs: calls.append((kernel, args, kwargs))

        return Recorder()


def kernel_modules() -> list[ModuleType]:
    """The modules of the ``compiled`` backend."""
    from nsa.backends import compiled

    found = pkgutil.walk_packages(compiled.__path__, f"{compiled.__name__}.")
    return [importlib.import_module(module.name) for module in found]


@contextmanager
def recorded(*modules: ModuleType) -> Iterator[Launches]:
    """Launches of the kernels of these modules are written down in place of being made."""
    from triton.runtime.jit import JITFunction

    launches = Launches()
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            for name, value in vars(module).copy().items():
                if isinstance(value, JITFunction):
                    patch.setattr(module, name, launches.recorder(value))
        yield launches


def compile_launch(
    kernel: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    capability: tuple[int, int] = SM_90,
) -> Code:
    """Compiles as the JIT would: ones are constants, multiples of 16 are known to be."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}

    def type_of(value: Any, path: tuple[int, ...], *, special: bool) -> Any:
        if isinstance(value, tuple):
            return tuple(type_of(x, (*path, j), special=special) for j, x in enumerate(value))
        if isinstance(value, Tensor):
            attributes[path] = [["tt.divisibility", 16]]
            return _NAMES[value.dtype]
        if isinstance(value, float):
            return "fp32"
        if value is None or (special and value == 1):
            constants[path] = value
            return "constexpr"
        if special and value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    for i, parameter in enumerate(kernel.params):
        value, name = values[parameter.name], parameter.name
        if parameter.is_constexpr:
            signature[name], constants[i,] = "constexpr", value
        else:
            signature[name] = type_of(value, (i,), special=not parameter.do_not_specialize)
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    target = 10 * capability[0] + capability[1]
    made = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    return _read(kernel.__name__, made.asm["ptx"], made.metadata.shared, target)


def _read(name: str, ptx: str, shared: int, target: int) -> Code:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.ptx")
        file.write_text(ptx)
        name_of_gpu = f"sm_{target}a" if target >= 90 else f"sm_{target}"
        command = [knobs.nvidia.ptxas.path, "-v", f"--gpu-name={name_of_gpu}", str(file)]
        ran = subprocess.run(
            [*command, "-o", str(file.with_suffix(".cubin"))],
            capture_output=True,
            text=True,
            check=True,
        )
        code = subprocess.run(
            [knobs.nvidia.nvdisasm.path, "-c", str(file.with_suffix(".cubin"))],
            capture_output=True,
            text=True,
            check=True,
        )
    registers = re.search(r"Used (\d+) registers", ran.stderr)
    stack = re.search(r"(\d+) bytes stack frame", ran.stderr)
    assert registers is not None, ran.stderr
    assert stack is not None, ran.stderr
    return Code(
        kernel=name,
        registers=int(registers[1]),
        spilled=int(stack[1]),
        spilled_in_loops=_spills_in_loops(code.stdout),
        shared=shared,
        instructions=len(re.findall(r"^\s+/\*[0-9a-f]+\*/", code.stdout, re.MULTILINE)),
        serialized="instructions are serialized" in ran.stderr,
    )


def _spills_in_loops(listing: str) -> int:
    """Loads and stores of local memory between a label and a later jump back to it."""
    labels: dict[str, int] = {}
    spills: list[int] = []
    seen: set[int] = set()
    for at, line in enumerate(listing.splitlines()):
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = at
        elif re.search(r"\b(LDL|STL)\b", line):
            spills.append(at)
        elif (jump := re.search(r"BRA.*`\((\.L_x_\d+)\)", line)) and jump[1] in labels:
            seen.update(x for x in spills if x > labels[jump[1]])
    return len(seen)
