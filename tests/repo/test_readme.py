"""The README tells the truth: its example runs, its tables are complete, its links are good."""

import re
from pathlib import Path

import pytest

from nsa.backends import TABLE
from nsa.settings import FLAGS, Settings

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def rows(first: str) -> list[list[str]]:
    """Cells of every table row whose first cell starts with ``first``."""
    lines = [line for line in README.splitlines() if line.startswith(f"| `{first}")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_example_runs(capsys):
    [example] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    [promised] = re.findall(r"print\(.*\)  # (.*)", example)
    assert capsys.readouterr().out.strip() == promised


def test_every_flag_is_described():
    described = {}
    for names, _, default, _ in rows("NSA_"):
        described |= dict.fromkeys(re.findall(r"NSA_\w+", names), default)
    assert set(described) == set(FLAGS)
    for flag, default in described.items():
        value = getattr(Settings(), flag.removeprefix("NSA_").lower())
        assert default == {None: "unset", False: "0"}.get(value, str(value)), flag


@pytest.mark.parametrize("name", TABLE)
def test_every_backend_is_described(name):
    assert len(rows(f"{name}`")) == 1


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (ROOT / target).exists(), target
