"""Tiles of rows whose columns are those of a head, in one part or two.

Triton's tiles have a power of two of columns. As one tile, a head of 192 would be padded to 256 in
every product and every sum; it is taken as 128 and 64 instead.

A *tile in parts* is a tuple of tiles with as many rows. SIZE is D or V, BLOCK what
:func:`.tiling.head_columns` makes of it, the sum of the parts' columns, which are the powers of two
in it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def num_parts(block):
    return bin(block).count("1")


@triton.constexpr_function
def part_begin(i, block):
    """The first column of part i."""
    return 0 if i == 0 else 1 << (block.bit_length() - 1)


@triton.constexpr_function
def part_size(i, block):
    """The columns of part i."""
    first = 1 << (block.bit_length() - 1)
    return first if i == 0 else block - first


@triton.jit
def columns(i: tl.constexpr, BLOCK: tl.constexpr):
    """Which columns part i has."""
    d = tl.arange(0, part_size(i, BLOCK))
    if i > 0:
        d += part_begin(i, BLOCK)
    return d


@triton.jit
def mask_columns(mask, i: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The mask of part i: of its rows, and of the head's columns if it is padded."""
    tile = mask[:, None]
    if part_begin(i, BLOCK) + part_size(i, BLOCK) > SIZE:
        tile = tile & (columns(i, BLOCK) < SIZE)[None, :]
    return tile


@triton.jit
def _pointers(ptr, at, stride, i: tl.constexpr, BLOCK: tl.constexpr):
    """Of part i, whose columns are ``stride`` apart; each row begins at ``ptr + at``, or at its own
    ptr if ``at`` is None."""
    d = columns(i, BLOCK)[None, :] * stride
    return ptr[:, None] + d if at is None else ptr + (at[:, None] + d)


@triton.jit
def load_rows(ptr, at, stride, mask, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """A tile in parts: SIZE elements, ``stride`` apart, from each of ``ptr + at`` on; 0 past them
    and where ``mask`` is not set, which may be None. Without ``at`` there is a ptr for each row."""
    tile = ()
    for i in tl.static_range(num_parts(BLOCK)):
        if mask is None:
            inside = (columns(i, BLOCK) < SIZE)[None, :]
        else:
            inside = mask_columns(mask, i, SIZE, BLOCK)
        tile += (tl.load(_pointers(ptr, at, stride, i, BLOCK), mask=inside, other=0.0),)
    return tile


@triton.jit
def store_rows(ptr, at, x, mask, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Stores x, a tile in parts, where :func:`load_rows` would load it, in the tensor's dtype."""
    for i in tl.static_range(num_parts(BLOCK)):
        inside = mask_columns(mask, i, SIZE, BLOCK)
        part_ptr = _pointers(ptr, at, 1, i, BLOCK)
        tl.store(part_ptr, x[i].to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def add_to_rows(ptr, at, x, mask, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Adds x, a tile in parts, where :func:`load_rows` would load it, atomically; all are fp32."""
    for i in tl.static_range(num_parts(BLOCK)):
        part_ptr = _pointers(ptr, at, 1, i, BLOCK)
        tl.atomic_add(part_ptr, x[i], mask=mask_columns(mask, i, SIZE, BLOCK), sem="relaxed")


@triton.jit
def zeros(ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A tile in parts of fp32 zeros."""
    tile = ()
    for i in tl.static_range(num_parts(BLOCK)):
        tile += (tl.full((ROWS, part_size(i, BLOCK)), 0.0, tl.float32),)
    return tile


@triton.jit
def dot_rows(x, y, C: tl.constexpr):
    """Products ``[rows of x, rows of y]`` of the rows of two tiles in parts."""
    s = tl.dot(x[0], tl.trans(y[0]), input_precision=C.PRECISION)
    for i in tl.static_range(1, len(x)):
        s = tl.dot(x[i], tl.trans(y[i]), s, input_precision=C.PRECISION)
    return s


@triton.jit
def add_products(tile, p, x, C: tl.constexpr):
    """``tile + p x`` of tiles in parts; p ``[rows of tile, rows of x]`` is rounded to x's dtype."""
    p = p.to(x[0].dtype)
    total = ()
    for i in tl.static_range(len(x)):
        total += (tl.dot(p, x[i], tile[i], input_precision=C.PRECISION),)
    return total


@triton.jit
def add_rows(x, y):
    """``x + y`` of tiles in parts."""
    total = ()
    for i in tl.static_range(len(x)):
        total += (x[i] + y[i],)
    return total


@triton.jit
def scale_rows(tile, factor):
    """A tile in parts, times a number or ``[rows, 1]``."""
    return [x * factor for x in tile]


@triton.jit
def divide_rows(tile, by):
    """A tile in parts over ``[rows, 1]``."""
    return [x / by for x in tile]


@triton.jit
def sum_products(x, y):
    """fp32 ``[rows]``: the sum of ``x * y`` over the columns."""
    total = tl.sum(x[0].to(tl.float32) * y[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(x)):
        total += tl.sum(x[i].to(tl.float32) * y[i].to(tl.float32), 1)
    return total


@triton.jit
def largest(tile):
    """fp32 ``[rows]``: the largest magnitude in the columns."""
    most = tl.max(tl.abs(tile[0].to(tl.float32)), 1)
    for i in tl.static_range(1, len(tile)):
        most = tl.maximum(most, tl.max(tl.abs(tile[i].to(tl.float32)), 1))
    return most
