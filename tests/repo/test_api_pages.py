"""The API reference: what `make docs` writes has no broken link and no markup left raw."""

import importlib
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Page(HTMLParser):
    """Anchors, links and text of a page."""

    def __init__(self, source):
        super().__init__()
        self.anchors, self.links, self.text = set(), set(), []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors.add(attrs.get("id"))
        if tag == "a" and not attrs.get("href", "https:").startswith("https:"):
            self.links.add(attrs["href"])

    def handle_data(self, data):
        self.text.append(data)


def broken_links(pages):
    """Pairs (page, link) of links to a file or an anchor that is not there."""
    broken = []
    for path, page in pages.items():
        for link in sorted(page.links):
            file, _, anchor = link.partition("#")
            target = pages.get((path.parent / file).resolve() if file else path)
            if target is None or (anchor and anchor not in target.anchors):
                broken.append((path.name, link))
    return broken


@pytest.fixture
def api_pages(monkeypatch):
    """The script of docs/api."""
    monkeypatch.syspath_prepend(ROOT / "docs" / "api")
    return importlib.import_module("api_pages")


@pytest.fixture
def pages(api_pages, tmp_path):
    pytest.importorskip("pdoc", reason="make docs installs pdoc, once the pages are wanted")
    pytest.importorskip("transformers", minversion="5.24")
    api_pages.build(tmp_path)
    return {path: Page(path.read_text(encoding="utf-8")) for path in tmp_path.rglob("*.html")}


def test_the_pages(api_pages, pages, tmp_path):
    assert broken_links(pages) == []
    for module in api_pages.MODULES:
        if module in api_pages.OPTIONAL and not api_pages.is_there(module):
            continue
        page = pages[tmp_path / f"{module.replace('.', '/')}.html"]
        assert re.findall(r":[a-z]+:`|::(?=\s)|ForwardRef", "".join(page.text)) == []
        names = importlib.import_module(module)
        assert set(getattr(names, "__all__", ())) <= page.anchors
    assert pages[tmp_path / "nsa.html"].links >= {"nsa/models.html", "nsa/inspection.html"}


@pytest.mark.parametrize("link", ["nowhere.html", "page.html#nothing", "#nothing"])
def test_a_broken_link_is_seen(link):
    source = '<a id="there" href="{}"></a><a href="https://example.org/">elsewhere</a>'
    for target, broken in ((link, [("page.html", link)]), ("#there", [])):
        assert broken_links({Path("/page.html"): Page(source.format(target))}) == broken


def test_modules_are_there(api_pages):
    for name in (*api_pages.MODULES, *api_pages.HIDDEN):
        path = ROOT / name.replace(".", "/")
        assert (path / "__init__.py").is_file() or path.with_suffix(".py").is_file()
