"""Memory of the layouts in which the compiled products copy x (cpp/products.h, tiles.h, outer.h, float_outer.h,
few_rows.h)."""

from __future__ import annotations

from flexgen.units import align

SPAN = 512
"""Rows of x that a product copies at once."""
_TILE_ROWS, _LANES, _DEPTH_BYTES, _LINE, _GAP = 4, 16, 4096, 64, 128
"""x is copied in whole tiles of rows, `_DEPTH_BYTES` of all rows before the next ones, in whole cache lines, with at
most `_GAP` bytes between rows. More than `_LANES` rows may be copied in whole vectors of rows, which take no more
memory than tiles of as many rows."""


def operand_bytes(rows: int, in_size: int, itemsize: int) -> int:
    """The maximum bytes of x (rows, in) in tiles or in vectors of rows. itemsize: bytes of an element of the copy."""
    row_bytes = in_size * itemsize
    pitch = align(min(row_bytes, _DEPTH_BYTES), _LINE) + _GAP
    unit = _LANES if rows > _LANES else _TILE_ROWS
    return align(min(rows, SPAN), unit) * -(-row_bytes // _DEPTH_BYTES) * pitch
