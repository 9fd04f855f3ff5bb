"""The compiled CPU kernels for attention: of new tokens over a paged cache, over a shared prefix, and of the
tokens of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flexgen.kernels.loading import NUMBERS, announce, native
from flexgen.kernels.partial import Partial
from flexgen.kernels.results import empty_result
from flexgen.kernels.scoring import Length, Scoring, Window, constants, longest, visible_from


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
    if not _has_kernel(q):
        return None
    out = _by_token(q, q.dtype)
    _attend(q, pages, _Range(length, starts), scoring, layout, _Results(out))
    return out


def part_compiled(
    q: Tensor,
    pages: Sequence[tuple[Tensor, Tensor]],
    length: Length,
    starts: Tensor | None,
    scoring: Scoring,
    layout: HeadLayout,
) -> Partial | None:
    """`attend_compiled` for `decode_part`."""
    if not _has_kernel(q):
        return None
    part = Partial(_by_token(q, torch.float32), torch.empty(q.shape[:3], dtype=torch.float32))
    _attend(q, pages, _Range(length, starts), scoring, layout, _Results(*part))
    return part


def prefix_compiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scoring: Scoring,
    first: Tensor | None,
    positions: Tensor | None,
) -> Partial | None:
    """`attend_prefix`, or None if there is no kernel for the device or dtype of q.

    first (rows, new): the first token of k and v that each query attends to, at most their number; None for 0.
    positions (rows,): those of the first new tokens, relative to the first token of k and v; only needed with slopes.
    """
    if not _has_kernel(q):
        return None
    rows, heads, new, head_dim = q.shape
    kv_heads, tokens = k.shape[:2]
    part = Partial(torch.empty(q.shape, dtype=torch.float32), torch.empty(q.shape[:3], dtype=torch.float32))
    q = q.contiguous()
    if k.stride() != v.stride() or k.stride()[1:] != (head_dim, 1):
        k, v = k.contiguous(), v.contiguous()
    first, positions = (
        None if x is None else x.to("cpu", torch.int64).contiguous() for x in (first, positions)
    )
    slopes = _by_head(constants(scoring.slopes, q.device) if scoring.slopes else None, heads)
    native.attend_prefix(
        NUMBERS[q.dtype],
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        part.values.data_ptr(),
        part.lse.data_ptr(),
        (rows, heads, kv_heads, new, head_dim, tokens, k.stride(0)),
        _address(first),
        _address(positions),
        (scoring.scale, scoring.cap or 0.0, _address(slopes)),
        torch.get_num_threads(),
    )
    return part


def prompt_compiled(
    q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, first: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """Causal attention of the last tokens of prompts without padding, or None if there is no kernel for it.

    q (batch, heads, queries, head_dim) has the last of the tokens of k and v (batch, kv_heads, tokens, head_dim).
    first (queries,) int64: the first token that each query attends to, instead of the window; None for 0. Returns
    (batch, heads, queries, head_dim), stored by token, and the log-sum-exp of the scores and the sink (batch, heads,
    queries) in float32.
    """
    if not _has_kernel(q) or not q.numel() or not q.dtype == k.dtype == v.dtype:
        return None
    batch, heads, queries, head_dim = q.shape
    kv_heads, tokens = k.shape[1:3]
    by_token = q.transpose(1, 2).contiguous()
    if k.stride() != v.stride() or k.stride(3) != 1:
        k, v = k.contiguous(), v.contiguous()
    out, lse = empty_result(by_token.shape, q.dtype), torch.empty(batch, heads, queries, dtype=torch.float32)
    slopes = _by_head(constants(scoring.slopes, q.device) if scoring.slopes else None, heads)
    sinks = _by_head(None if scoring.sinks is None else scoring.sinks.float().contiguous(), heads)
    native.attend_prompt(
        NUMBERS[q.dtype],
        by_token.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        out.data_ptr(),
        lse.data_ptr(),
        (batch, heads, kv_heads, queries, head_dim, tokens, k.stride(0), k.stride(1), k.stride(2)),
        _address(first),
        (scoring.scale, scoring.cap or 0.0, _address(slopes), _address(sinks)),
        torch.get_num_threads(),
    )
    return out.transpose(1, 2), lse


class _Range(NamedTuple):
    """The positions of the cache: the first `length` of each row, from `starts` on."""

    length: Length
    starts: Tensor | None


class _Results(NamedTuple):
    """The tensors that the kernel writes: `out` (see `_by_token`) in the dtype of q, or a part."""

    out: Tensor
    lse: Tensor | None = None


def _has_kernel(q: Tensor) -> bool:
    return q.device.type == "cpu" and q.dtype in NUMBERS and announce()


def _by_token(q: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor with the shape of q, stored by token, then by head, so that merging the heads afterwards is a view."""
    rows, heads, new, head_dim = q.shape
    return empty_result((rows, new, heads, head_dim), dtype).transpose(1, 2)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _by_head(x: Tensor | None, heads: int) -> Tensor | None:
    """x, checked: (heads,) on the CPU."""
    if x is not None and (x.shape != (heads,) or x.device.type != "cpu"):
        raise ValueError(f"slopes and sinks must be {heads} numbers on cpu, one per head")
    return x


def _first_seen(seen: _Range, window: Window | None, rows: int, new: int) -> Tensor | None:
    """The first position that each of the last `new` positions of a row attends to, (rows, new); None for 0."""
    if seen.starts is not None and seen.starts.shape != (rows,):
        raise ValueError(f"starts must be {rows} integers of at least 0, one per row")
    starts = None if seen.starts is None else seen.starts.to("cpu", torch.int64)
    if new == 1:
        starts = visible_from(window, starts, seen.length, rows, torch.device("cpu"))
    elif window is not None:
        whole = seen.length[:, None] if isinstance(seen.length, Tensor) else seen.length
        first = torch.zeros(rows, 1, dtype=torch.int64) if starts is None else starts[:, None]
        return window.starts(first, whole - torch.arange(new - 1, -1, -1)).clamp_min_(0).contiguous()
    return None if starts is None else starts[:, None].expand(rows, new).contiguous()


def _attend(
    q: Tensor,
    pages: Sequence[tuple[Tensor, Tensor]],
    seen: _Range,
    scoring: Scoring,
    layout: HeadLayout,
    results: _Results,
) -> None:
    rows, heads, new, head_dim = q.shape
    if not q.numel():
        return
    q = q.transpose(1, 2).contiguous()  # projections return it so
    ends = seen.length.contiguous() if isinstance(seen.length, Tensor) else None
    starts = _first_seen(seen, scoring.window, rows, new)
    if starts is not None and int(starts.min()) < 0:
        raise ValueError(f"starts must be {rows} integers of at least 0, one per row")
    slopes = _by_head(constants(scoring.slopes, q.device) if scoring.slopes else None, heads)
    sinks = _by_head(None if scoring.sinks is None else scoring.sinks.float().contiguous(), heads)
    native.decode_attention(
        NUMBERS[q.dtype],
        q.data_ptr(),
        results.out.data_ptr(),
        _address(results.lse),
        (rows, heads, pages[0][0].shape[1], new, head_dim),
        layout,
        [k.data_ptr() for k, _ in pages],
        [v.data_ptr() for _, v in pages],
        [k.shape[2] for k, _ in pages],
        longest(seen.length, 0),
        _address(starts),
        _address(ends),
        (scoring.scale, scoring.cap or 0.0, _address(slopes), _address(sinks)),
        torch.get_num_threads(),
    )
