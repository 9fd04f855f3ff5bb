"""The compiled CPU kernel for attention of one new token per row over a paged cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flexgen.kernels.loading import NUMBERS, announce, native
from flexgen.kernels.scoring import Length, Scoring, constants, longest, visible_from


class HeadLayout(NamedTuple):
    """The storage of a head in a page: `bits` per code (0 for plain values), values per `group`, and bytes per
    head."""

    bits: int
    group: int
    nbytes: int


def attend_compiled(
    q: Tensor,
    pages: Sequence[tuple[Tensor, Tensor]],
    length: Length,
    starts: Tensor | None,
    scoring: Scoring,
    layout: HeadLayout,
) -> Tensor | None:
    """`decode_attention` over pages of this layout, or None if there is no kernel for the device or dtype of q.

    Reads keys and values once, in place, and skips padding and what is beyond a row's length.
    """
    if q.device.type != "cpu" or q.dtype not in NUMBERS or not announce():
        return None
    rows, heads, _, head_dim = q.shape
    q = q.contiguous()
    out = torch.empty_like(q)
    if not q.numel():
        return out
    ends = length.contiguous() if isinstance(length, Tensor) else None
    starts = visible_from(scoring.window, starts, length, rows, q.device)
    if starts is not None:
        starts = starts.to("cpu", torch.int64).contiguous()
        if starts.shape != (rows,) or int(starts.min()) < 0:
            raise ValueError(f"starts must be {rows} integers of at least 0, one per row")
    slopes = constants(scoring.slopes, q.device) if scoring.slopes else None
    sinks = None if scoring.sinks is None else scoring.sinks.float().contiguous()
    for each in (slopes, sinks):
        if each is not None and (each.shape != (heads,) or each.device != q.device):
            raise ValueError(f"slopes and sinks must be {heads} numbers on {q.device}, one per head")
    native.decode_attention(
        NUMBERS[q.dtype],
        q.data_ptr(),
        out.data_ptr(),
        (rows, heads, pages[0][0].shape[1], head_dim),
        layout,
        [k.data_ptr() for k, _ in pages],
        [v.data_ptr() for _, v in pages],
        [k.shape[2] for k, _ in pages],
        longest(length, 0),
        0 if starts is None else starts.data_ptr(),
        0 if ends is None else ends.data_ptr(),
        (
            scoring.scale,
            scoring.cap or 0.0,
            0 if slopes is None else slopes.data_ptr(),
            0 if sinks is None else sinks.data_ptr(),
        ),
        torch.get_num_threads(),
    )
    return out
