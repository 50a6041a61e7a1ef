"""Copies of the modules that selected attention needs, in the layout of the kernels hub.

The layout (huggingface.co/docs/kernels/kernel-requirements): ``build/<variant>/`` is a Python
package that may stand anywhere, several versions of it in one process, so that its imports of
itself are relative. ``torch-universal`` is a variant without compiled code.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from pathlib import Path

import nsa
from nsa.errors import DataError

NAME = "nsa_selected_attention"
VARIANT = "torch-universal"
FACE = "nsa.backends.compiled.selected.standalone"
"""The module that a user of the package calls."""

_HUB_NAME = NAME.replace("_", "-")
_ROOT = Path(nsa.__file__).parent.parent
_IMPORT = re.compile(r"^( *from )nsa\.([\w.]+)(?= import )", re.MULTILINE)


def build(target: Path) -> list[Path]:
    """Write the package into a new or empty folder; returns its files.

    Raises:
        DataError: there are files in it.
    """
    if target.exists() and any(target.iterdir()):
        raise DataError(f"target: expected a new or empty folder, got files in {target}")
    package = target / "build" / VARIANT
    files: dict[Path, str] = {}
    for module in needed():
        parts = module.split(".")[1:]
        dots = "." * len(parts)
        text = _file(module).read_text(encoding="utf-8")
        files[package.joinpath(*parts).with_suffix(".py")] = _IMPORT.sub(rf"\1{dots}\2", text)
        for depth in range(1, len(parts)):
            files.setdefault(package.joinpath(*parts[:depth], "__init__.py"), "")
    face = FACE.removeprefix("nsa")
    export = 'from {} import selected_attention\n\n__all__ = ["selected_attention"]\n'
    files[package / "__init__.py"] = export.format(face)
    files[package / NAME / "__init__.py"] = export.format(
        f".{face}"
    )  # for older releases of kernels
    digest = hashlib.sha256("".join(files.values()).encode()).hexdigest()[:12]
    metadata = {
        "name": _HUB_NAME,
        "id": f"_{NAME}_{digest}",  # what it is called in sys.modules: another for each version
        "version": 1,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cuda"},
    }
    files[package / "metadata.json"] = json.dumps(metadata, indent=2) + "\n"
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return sorted(files)


def needed() -> list[str]:
    """The modules that :data:`FACE` imports, itself and those that these import included."""
    found: set[str] = set()
    left = [FACE]
    while left:
        module = left.pop()
        if module in found:
            continue
        found.add(module)
        for node in ast.walk(ast.parse(_file(module).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nsa."):
                inner = (f"{node.module}.{alias.name}" for alias in node.names)
                left += [name if _file(name).is_file() else str(node.module) for name in inner]
    return sorted(found)


def _file(module: str) -> Path:
    return _ROOT.joinpath(*module.split(".")).with_suffix(".py")
