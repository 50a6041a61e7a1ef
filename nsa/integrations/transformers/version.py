"""Which transformers this integration is for."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from nsa.errors import MissingDependency

OLDEST = (5, 24)
"""Its cache layers, and the names of the arguments that its attention modules get."""


def check_version() -> None:
    """Refuse to go on without transformers, or with one that is too old.

    Raises:
        MissingDependency: names what to install.
    """
    try:
        found = version("transformers")
    except PackageNotFoundError:
        found = "none"
    numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdecimal())
    if numbers < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise MissingDependency(
            f"transformers: expected {oldest} or later, got {found}; "
            "pip install --upgrade 'nsa-torch[hf]'"
        )
