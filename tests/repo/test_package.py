"""What ``make dist`` builds installs by itself, and works without what is optional.

The environments are new, and hold links to the packages of the one that runs the tests: nothing is
downloaded.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import nsa

ROOT = Path(__file__).resolve().parents[2]
NOT_SOURCE = (".*", "build", "dist", "mutants", "runs", "*.egg-info", "__pycache__")
PIP = (sys.executable, "-m", "pip")
ALONE = ("--no-cache-dir", "--no-deps", "--no-build-isolation", "--no-index")

pytestmark = pytest.mark.slow

FORWARD = """
import nsa, torch
layer = nsa.NSAttention(32, nsa.NSAConfig(num_heads=4, num_kv_heads=2, head_dim=16))
layer(torch.randn(1, 80, 32)).sum().backward()
print(nsa.__version__, layer.resolution.backend, nsa.__file__)
"""
RESOLVE_COMPILED = """
import nsa, torch
nsa.resolve(
    nsa.NSAConfig(), device="cuda", dtype=torch.bfloat16, length=512, packed=False,
    needs_grad=True, backend="compiled",
)
"""


def run(*command: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("NSA_", "PYTHON"))}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**environ, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def succeed(*command: object, cwd: Path, **variables: str) -> str:
    done = run(*command, cwd=cwd, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist of this tree and the wheel of that sdist, as ``make dist`` makes them, where torch
    cannot be imported."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("dist")
    tree, poison = folder / "tree", folder / "poison"
    shutil.copytree(ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    poison.mkdir()
    (poison / "torch.py").write_text("raise ImportError('a build needs no torch')\n")
    build = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    succeed(sys.executable, "-c", build, cwd=tree, PYTHONPATH=str(poison))
    (sdist,) = (tree / "dist").iterdir()
    succeed(*PIP, "wheel", *ALONE, "--wheel-dir", folder, sdist, cwd=folder, PYTHONPATH=str(poison))
    (wheel,) = folder.glob("*.whl")
    return {"sdist": sdist, "wheel": wheel}


def environment(folder: Path, package: Path, *, without: str = "") -> Path:
    """The interpreter of a new environment with the package; all others but one are linked."""
    venv.create(folder)
    (site,) = folder.glob("lib/python*/site-packages")
    for entry in (x for at in sys.path if at.endswith("-packages") for x in Path(at).iterdir()):
        name = entry.name.split("-")[0].lower()
        if name not in (without, "nsa_torch", "_virtualenv") and not name.startswith("__"):
            (site / entry.name).symlink_to(entry)
    python = folder / "bin" / "python"
    succeed(*PIP, "--python", python, "install", *ALONE, package, cwd=folder)
    return python


@pytest.mark.parametrize("kind", ["sdist", "wheel"])
def test_an_installed_package_runs(built: dict[str, Path], tmp_path: Path, kind: str) -> None:
    python = environment(tmp_path / "venv", built[kind])
    version, backend, file = succeed(python, "-c", FORWARD, cwd=tmp_path).split()
    assert (version, backend) == (nsa.__version__, "sdpa")
    assert Path(file).is_relative_to(tmp_path / "venv")
    for tool in ("bench", "diagnose", "generate", "inspect", "train"):
        assert tool in succeed(python, "-m", f"nsa.tools.{tool}", "--help", cwd=tmp_path)


def test_the_wheel_holds_the_package_and_the_licence(built: dict[str, Path]) -> None:
    source = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "nsa").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(built["wheel"]) as wheel:
        names = set(wheel.namelist())
        info = f"nsa_torch-{nsa.__version__}.dist-info"
        assert {name for name in names if not name.startswith(info)} == source
        assert "nsa/py.typed" in source
        assert wheel.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
    assert (metadata["Name"], metadata["Version"]) == ("nsa-torch", nsa.__version__)
    needed = [x for x in metadata.get_all("Requires-Dist") or () if "extra ==" not in x]
    assert {x.split(">")[0] for x in needed} == {"torch", "numpy", "rich"}


def test_the_sdist_holds_the_package_and_the_licence(built: dict[str, Path]) -> None:
    with tarfile.open(built["sdist"]) as sdist, zipfile.ZipFile(built["wheel"]) as wheel:
        names = {name.partition("/")[2] for name in sdist.getnames()}
        assert {name for name in wheel.namelist() if name.startswith("nsa/")} <= names
    assert {"LICENSE", "README.md", "pyproject.toml"} <= names
    assert not {name for name in names if name.startswith(("tests/", "benchmarks/"))}


@pytest.mark.parametrize(
    ("absent", "command", "fix"),
    [
        ("triton", ("-c", RESOLVE_COMPILED), "pip install triton"),
        ("transformers", ("-c", "import nsa.integrations.transformers"), "'nsa-torch[hf]'"),
        ("torchtitan", ("-c", "import nsa.integrations.torchtitan"), "pip install torchtitan"),
        ("matplotlib", ("-m", "nsa.tools.bench", "--plot", "x.svg"), "'nsa-torch[bench]'"),
        ("safetensors", ("-m", "nsa.tools.train", "--out", "run"), "'nsa-torch[train]'"),
    ],
)
def test_what_is_optional_may_be_absent(
    built: dict[str, Path], tmp_path: Path, absent: str, command: tuple[str, ...], fix: str
) -> None:
    python = environment(tmp_path / "venv", built["wheel"], without=absent)
    assert run(python, "-c", f"import {absent}", cwd=tmp_path).returncode == 1
    assert succeed(python, "-c", FORWARD, cwd=tmp_path).split()[1] == "sdpa"
    done = run(python, *command, cwd=tmp_path)
    *before, line = done.stderr.splitlines()
    assert done.returncode != 0
    assert absent in line
    assert fix in line
    if command[0] == "-m":  # a tool shows no traceback
        assert before == []
        assert line.startswith("error: ")
