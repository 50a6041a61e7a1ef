"""The API reference, as `make docs` writes it: pages of the public modules, made of docstrings."""

import sys
from pathlib import Path

from nsa.errors import MissingDependency

MODULES = (
    "nsa",
    "nsa.distributed",
    "nsa.inspection",
    "nsa.inspection.dense",
    "nsa.inspection.lists",
    "nsa.inspection.scores",
    "nsa.inspection.sinks",
    "nsa.integrations.transformers",
    "nsa.memory",
    "nsa.models",
    "nsa.models.decode_graph",
    "nsa.reference",
    "nsa.testing",
)
HIDDEN = ("nsa.inspection.complaints", "nsa.integrations.transformers.convert")
"""Modules that a function of their package is named after: pdoc takes them for public."""


def build(folder: Path) -> None:
    """Write the pages, ``nsa.html`` first."""
    import pdoc

    modules = list(MODULES)
    try:
        import nsa.integrations.transformers  # noqa: F401
    except MissingDependency as error:
        modules.remove("nsa.integrations.transformers")
        print(f"nsa.integrations.transformers is left out: {error}", file=sys.stderr)
    pdoc.render.configure(
        docformat="google", show_source=False, template_directory=Path(__file__).parent
    )
    pdoc.pdoc(*modules, *(f"!{name}$" for name in HIDDEN), output_directory=folder)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
    print(Path(sys.argv[1], "nsa.html"))
