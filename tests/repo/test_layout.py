"""The tree keeps its promises: links, the direction of imports, a light `import nsa`."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "nsa"

# A module imports from its own layer and from those before it.
LAYERS = (
    ("config", "registry", "settings", "errors"),
    ("core",),
    ("compression", "gates", "selection", "cache", "padding"),
    ("backends",),
    ("attention",),
    ("cached_attention",),
    ("module", "memory"),
    ("",),  # nsa/__init__.py, the public names
    ("inspection", "integrations"),
    ("models",),
    ("distributed",),
    ("training",),
    ("testing",),
    ("tools",),
)
SHARED = ("registry", "dispatch", "protocol", "shared")
"""What is no backend in nsa/backends."""


def layer(part: str) -> int:
    for i, names in enumerate(LAYERS):
        if part in names:
            return i
    raise AssertionError(f"nsa.{part} has no place in LAYERS yet: give it one")


def family(module: str) -> str | None:
    """The backend that a module of nsa.backends belongs to, its folder, or None."""
    folder = [*module.removeprefix("nsa.backends").split("."), ""][1]
    return None if folder in ("", *SHARED) else folder


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {path: name_of(path) for path in sorted(PACKAGE.rglob("*.py"))}
NAMES = {f"nsa.{part}" for parts in LAYERS for part in (*parts, "reference")} | {
    *MODULES.values(),
}


def imported(name: str, source: str, *, package: bool = False) -> set[str]:
    """The modules that a module imports, wherever in its code."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = name.split(".")
                parts = parts[: len(parts) - node.level + (1 if package else 0)]
                base = ".".join([*parts, base] if base else parts)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in NAMES else base)
    return found


def wrong_imports(name: str, source: str, *, package: bool = False) -> list[str]:
    """What a module of the library must not import, and does."""
    part = [*name.split("."), ""][1]
    wrong = []
    for target in imported(name, source, package=package):
        if target.split(".")[0] != "nsa":
            continue
        other = [*target.split("."), ""][1]
        if part == "reference":
            allowed = other in ("reference", "config")
        elif other == "reference":
            allowed = part in ("testing", "tools")
        else:
            allowed = layer(other) <= layer(part)
        if part == other == "backends" and family(name) and family(target):
            allowed = family(name) == family(target)
        if not allowed:
            wrong.append(target)
    return sorted(wrong)


def environment_reads(source: str) -> list[str]:
    """Every mention of the process environment."""
    names = ("environ", "environb", "getenv", "getenvb")
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in names:
            found.append(f"os.{node.attr}")
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            found += [f"os.{alias.name}" for alias in node.names if alias.name in names]
    return found


# Links and files


@pytest.mark.parametrize("name", ["backends", "reference", "tools"])
def test_the_root_links_point_into_the_package(name):
    link = ROOT / name
    assert link.is_symlink()
    assert os.readlink(link) == f"nsa/{name}"
    assert link.resolve() == PACKAGE / name


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").is_file()


# The direction of imports


@pytest.mark.parametrize("path", MODULES, ids=MODULES.get)
def test_imports_flow_one_way(path):
    source = path.read_text(encoding="utf-8")
    package = path.name == "__init__.py"
    assert wrong_imports(MODULES[path], source, package=package) == []


@pytest.mark.parametrize("path", MODULES, ids=MODULES.get)
def test_only_settings_reads_the_environment(path):
    expected = path == PACKAGE / "settings.py"
    assert bool(environment_reads(path.read_text(encoding="utf-8"))) == expected


@pytest.mark.parametrize(
    ("name", "source", "wrong"),
    [
        ("nsa.config", "from nsa.core import geometry", ["nsa.core.geometry"]),
        ("nsa.settings", "def f():\n    import nsa.backends", ["nsa.backends"]),
        ("nsa.attention", "from nsa import module", ["nsa.module"]),
        ("nsa.attention", "from nsa import NSAttention", ["nsa"]),
        ("nsa.module", "from .models import LanguageModel", ["nsa.models"]),
        ("nsa.module", "from nsa.testing import parity", ["nsa.testing.parity"]),
        ("nsa.models.dense", "from ..tools import train", ["nsa.tools.train"]),
        (
            "nsa.reference.masks",
            "from nsa.core.geometry import overlap_weights",
            ["nsa.core.geometry"],
        ),
        ("nsa.reference.masks", "from nsa.errors import ShapeError", ["nsa.errors"]),
        ("nsa.backends.sdpa.steps", "from nsa import reference", ["nsa.reference"]),
        (
            "nsa.backends.sdpa.steps",
            "from nsa.backends.fa2 import dense",
            ["nsa.backends.fa2.dense"],
        ),
        ("nsa.backends.fa2.dense", "from ..sdpa import window", ["nsa.backends.sdpa.window"]),
        ("nsa.backends.sdpa.steps", "from nsa.attention import run", ["nsa.attention"]),
    ],
)
def test_a_wrong_import_is_seen(name, source, wrong):
    assert wrong_imports(name, source) == wrong


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("nsa.settings", "from nsa.errors import nearest"),
        ("nsa.reference.masks", "from nsa.config import NSAConfig\nfrom .packing import spans"),
        ("nsa.backends.sdpa.steps", "from nsa.backends import protocol\nfrom . import window"),
        ("nsa.backends.fa2.dense", "from nsa.backends import load\nfrom . import providers"),
        ("nsa.tools.bench", "from nsa import reference, nsa_attention"),
        ("nsa.attention", "import torch\nfrom torch import nn"),
    ],
)
def test_a_right_import_passes(name, source):
    assert wrong_imports(name, source) == []


@pytest.mark.parametrize(
    "source",
    [
        "import os\nx = os.environ['A']",
        "import os as o\no.getenv('A')",
        "from os import environ as e",
    ],
)
def test_a_read_of_the_environment_is_seen(source):
    assert environment_reads(source)


# A light import


def brought_in(statement: str) -> dict:
    """What a statement imports in a fresh process beyond torch, numpy and the standard library."""
    code = f"""
import json, sys
import numpy, torch
before = {{name.split(".")[0] for name in sys.modules}}
{statement}
after = {{name.split(".")[0] for name in sys.modules}}
print(json.dumps({{
    "modules": sorted(after - before - sys.stdlib_module_names),
    "cuda": torch.cuda.is_initialized(),
    "compiler": "torch._inductor" in sys.modules,
}}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_import_nsa_needs_torch_and_numpy_alone():
    assert brought_in("import nsa") == {"modules": ["nsa"], "cuda": False, "compiler": False}


def test_diagnose_needs_what_is_always_installed():
    found = brought_in("import nsa.tools.diagnose.__main__")
    assert set(found["modules"]) <= {"nsa", "rich"}
    assert not found["cuda"]


def test_a_heavier_import_is_seen():
    modules = brought_in("import nsa, rich.table, safetensors")["modules"]
    assert {"nsa", "rich", "safetensors"} <= set(modules)


def test_a_cuda_context_would_be_seen():
    assert brought_in("torch.cuda.is_initialized = lambda: True")["cuda"]
