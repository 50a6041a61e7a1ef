"""Shares from 0 to 1 as a PNG image of one colour, written by hand: no package is needed."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence

_COLOUR = (0, 114, 178)


def png(rows: Sequence[Sequence[float]]) -> bytes:
    """One pixel for each share: 0 is transparent, so that it shows on any background."""
    lines = b"".join(
        b"\0" + bytes(min(255, max(0, round(255 * share))) for share in row) for row in rows
    )
    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 3, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        _chunk(name, data)
        for name, data in (
            (b"IHDR", header),
            (b"PLTE", bytes(_COLOUR) * 256),
            (b"tRNS", bytes(range(256))),
            (b"IDAT", zlib.compress(lines, 9)),
            (b"IEND", b""),
        )
    )


def data_uri(image: bytes) -> str:
    """The image as the ``src`` of an ``img``."""
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
