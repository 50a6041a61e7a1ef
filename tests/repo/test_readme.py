"""README and docs tell the truth: examples run, tables are complete, links and figures are good."""

import importlib
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

from nsa.registry import TABLE
from nsa.settings import FLAGS, Settings

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "docs" / "figures"
DOCS = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").glob("*.md"))]
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *DOCS]
HISTORY = ("CHANGELOG.md", "docs/measurements.md", "docs/experiments.md")
"""Pages that may name what is no more."""
EXAMPLE = re.compile(r"```python\n(.*?)```", re.DOTALL)


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def rows(page: str, first: str) -> list[list[str]]:
    """Cells of every table row of a page whose first cell starts with ``first``."""
    lines = [line for line in read(page).splitlines() if line.startswith(f"| `{first}")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def anchors(page: str) -> set[str]:
    """The names of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", read(page), re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {text.strip().replace(" ", "-") for text in words}


def broken_links(page: str, text: str) -> list[str]:
    """Links of a page, images among them, to a file or a heading that is not there."""
    broken = []
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        target, _, anchor = link.partition("#")
        path = ((ROOT / page).parent / target).resolve() if target else ROOT / page
        if not path.exists() or (anchor and anchor not in anchors(str(path.relative_to(ROOT)))):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", [page for page in PAGES if EXAMPLE.search(read(page))])
def test_examples_run(page, capsys):
    for example in EXAMPLE.findall(read(page)):
        if "transformers" in example:
            pytest.importorskip("transformers", minversion="5.24")
        exec(compile(example, page, "exec"), {})
        promised = re.findall(r"^print\(.*\)  # (.*)", example, re.MULTILINE)
        assert capsys.readouterr().out.splitlines() == promised


def test_the_readme_has_an_example():
    assert EXAMPLE.search(read("README.md"))


def test_every_flag_is_described():
    described = {}
    for names, _, default, _ in rows("docs/settings.md", "NSA_"):
        described |= dict.fromkeys(re.findall(r"NSA_\w+", names), default)
    assert set(described) == set(FLAGS)
    for flag, default in described.items():
        value = getattr(Settings(), flag.removeprefix("NSA_").lower())
        assert default == {None: "unset", False: "0"}.get(value, str(value)), flag


@pytest.mark.parametrize("page", ["README.md", "docs/backends.md"])
@pytest.mark.parametrize("name", TABLE)
def test_every_backend_is_described(page, name):
    described = [row for row in rows(page, f"{name}`") if row[0] == f"`{name}`" and len(row) == 4]
    assert described
    assert all(all(row) for row in described)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    assert broken_links(page, read(page)) == []


# rooms that the layout plans


def missing_paths(text: str) -> set[str]:
    """Files and folders named in code spans that are neither at the root nor in ``nsa/``."""
    named = set(re.findall(r"`([\w./]+(?:\.py|\.md|/))`", text))
    return {path for path in named if not any((ROOT / at / path).exists() for at in ("", "nsa"))}


@pytest.mark.parametrize("page", [page for page in PAGES if page not in HISTORY])
def test_pages_name_files_that_are_there(page):
    assert missing_paths(read(page)) <= {"tiles.py"}  # one beside each kernel


def test_a_path_that_is_not_there_is_seen():
    text = "`nowhere.py`, `core/`, `docs/tools.md`, `nothing/`, `nsa_window_fwd`"
    assert missing_paths(text) == {"nowhere.py", "nothing/"}


@pytest.mark.parametrize("link", ["docs/nowhere.md", "docs/tools.md#nothing", "#nothing"])
def test_a_broken_link_is_seen(link):
    assert broken_links("README.md", f"a [link]({link})") == [link]


@pytest.mark.parametrize("page", DOCS)
def test_the_readme_leads_to_every_page(page):
    assert f"]({page})" in read("README.md")


# Figures


@pytest.fixture
def script(monkeypatch):
    """Imports a script of docs/figures."""
    monkeypatch.syspath_prepend(FIGURES)
    return importlib.import_module


def test_three_branches_is_what_its_script_draws(script):
    drawn = script("three_branches").draw()
    assert (FIGURES / "three_branches.svg").read_text(encoding="utf-8") == drawn
    assert "](docs/figures/three_branches.svg)" in read("README.md")


def test_speed_is_what_its_script_draws_of_the_measured_rows(script):
    """The rows, the figure and the link come together."""
    measured = FIGURES / "h100.jsonl"
    linked = "](docs/figures/speed.svg)" in read("README.md")
    assert measured.exists() == linked
    if linked:
        records = [json.loads(line) for line in measured.read_text(encoding="utf-8").splitlines()]
        drawn = script("speed").draw(records)
        assert (FIGURES / "speed.svg").read_text(encoding="utf-8") == drawn


HEADER = {"kind": "header", "device_name": "a device", "torch": "2.13.0"}


def bench_row(backend: str, branch: str, length: int, **changes: object) -> dict:
    row = {
        "kind": "row",
        "heads": "4/2:32",
        "dtype": "float32",
        "batch": 1,
        "length": length,
        "packed_lengths": None,
        "backend": backend,
        "branch": branch,
        "forward_ms": 1.5 * length,
        "both_ms": 4.5 * length,
        "note": None,
    }
    return row | changes


RUN = [
    HEADER,
    *(
        bench_row(*names, length)
        for length in (1024, 1500)
        for names in (("sdpa", "all+select"), ("sdpa", "window"), ("dense SDPA", "dense"))
    ),
]


def test_speed_names_each_line_at_its_end(script):
    drawn = script("speed").draw(RUN)
    for text in (">sdpa, 2,250<", ">dense SDPA, 2,250<", ">sdpa, 6,750<", ">1k<", "a device"):
        assert text in drawn
    assert drawn.count(">sdpa, ") == drawn.count(">dense SDPA, ") == 2  # once in each panel


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (RUN[1:], "expected the header of one run, got 0"),
        ([HEADER, *RUN], "expected the header of one run, got 2"),
        ([HEADER, RUN[1], RUN[4]], "expected rows of the branch dense, got none"),
        ([*RUN, bench_row("sdpa", "all+select", 64, batch=2)], "expected rows of one problem"),
        ([*RUN, bench_row("new", "all+select", 64)], r"expected names of STYLES, got \['new'\]"),
        (RUN[:4], "expected times at two lengths or more"),
    ],
)
def test_speed_refuses_what_it_cannot_compare(script, records, message):
    with pytest.raises(ValueError, match=message):
        script("speed").draw(records)


def test_names_of_lines_do_not_overlap(script):
    speed = script("speed")
    placed = speed._apart({"a": 100.0, "b": 101.0, "c": 110.0, "d": 200.0})
    heights = sorted(placed.values())
    assert min(b - a for a, b in pairwise(heights)) >= speed.NAME_HEIGHT
    assert placed["d"] == 200
    assert sorted(placed, key=placed.get) == ["a", "b", "c", "d"]
