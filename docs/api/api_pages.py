"""The API reference, as `make docs` writes it: pages of the public modules, made of docstrings."""

import importlib
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
    "nsa.integrations.checkpoints",
    "nsa.integrations.torchtitan",
    "nsa.integrations.transformers",
    "nsa.memory",
    "nsa.models",
    "nsa.models.decode_graph",
    "nsa.reference",
    "nsa.testing",
)
OPTIONAL = ("nsa.integrations.torchtitan", "nsa.integrations.transformers")
"""Those that need another package."""
HIDDEN = ("nsa.inspection.complaints", "nsa.integrations.transformers.convert")
"""Modules that a function of their package is named after: pdoc takes them for public."""


def is_there(name: str) -> bool:
    """Whether a module can be imported; says why not."""
    try:
        importlib.import_module(name)
    except MissingDependency as error:
        print(f"{name} is left out: {error}", file=sys.stderr)
        return False
    return True


def build(folder: Path) -> None:
    """Write the pages, ``nsa.html`` first."""
    import pdoc

    modules = [name for name in MODULES if name not in OPTIONAL or is_there(name)]
    pdoc.render.configure(
        docformat="google", show_source=False, template_directory=Path(__file__).parent
    )
    pdoc.pdoc(*modules, *(f"!{name}$" for name in HIDDEN), output_directory=folder)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
    print(Path(sys.argv[1], "nsa.html"))
