"""Build the kernels-hub package of selected attention: ``python -m nsa.tools.hub FOLDER``.

``kernels.get_local_kernel(FOLDER)`` loads it; nothing is uploaded.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from nsa.tools.common.cli import Parser, run
from nsa.tools.hub.build import build


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(prog="python -m nsa.tools.hub", description=__doc__)
    parser.add_argument("folder", type=Path, help="a new or empty folder")
    folder = parser.parse_strictly(argv).folder
    print(f"{len(build(folder))} files in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
