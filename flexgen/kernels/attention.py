"""Attention of the new tokens of each row, one or a few, over a paged cache, in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flexgen.kernels.heads import HeadFormat, Pages, PlainHeads
from flexgen.kernels.partial import Partial
from flexgen.kernels.result_memory import RESULT_MEMORY
from flexgen.kernels.scoring import (
    Length,
    Scoring,
    Window,
    bend,
    capped,
    longest,
    softmax_part,
    softmax_with_sinks,
    visible_from,
)
from flexgen.units import align

MASK_ALIGNMENT = 16
"""Values. The rows of a mask begin at multiples of it; otherwise torch makes an aligned copy of the mask in each
call."""


def decode_attention(
    q: Tensor,
    pages: Pages,
    length: Length,
    starts: Tensor | None,
    scoring: Scoring,
    form: HeadFormat | None = None,
) -> Tensor:
    """Attention of the new tokens of each row, the last of the first `length` positions of the cache.

    q (rows, heads, new, head_dim): in the dtype of the cache; heads is a multiple of kv_heads. Each new token attends
    to the positions up to its own. form: the format of heads in the pages. Plain memory beyond `length` must be
    finite, because only the compiled kernel never reads it: allocate pages zero-filled. If rows have different
    lengths, this is also true for encoded memory. The new tokens of a row are its last positions, up to length - 1.
    Lengths on a GPU are not checked.
    starts (rows,): integers, at most the position of the first new token. Positions before a row's start are padding;
    None for no padding. Without the oldest pages of a window, positions count from the first page, and starts may be
    negative.
    Returns (rows, heads, new, head_dim). Softmax and sums are in float32. The compiled kernel reads keys and values
    once for all new tokens, torch once for each of them.
    """
    form = form or PlainHeads(q.shape[-1], q.dtype)
    check_pages(q, pages, length, form)
    outputs = form.attend(q, pages, length, starts, scoring)
    return attend_in_torch(q, pages, length, starts, scoring, form) if outputs is None else outputs


def decode_part(
    q: Tensor,
    pages: Pages,
    length: Length,
    starts: Tensor | None,
    scoring: Scoring,
    form: HeadFormat | None = None,
) -> Partial:
    """`decode_attention` as a part of the attention over more tokens, with the log-sum-exp of its scores.

    With sinks, these are in the part.
    """
    form = form or PlainHeads(q.shape[-1], q.dtype)
    check_pages(q, pages, length, form)
    part = form.attend_part(q, pages, length, starts, scoring)
    return part_in_torch(q, pages, length, starts, scoring, form) if part is None else part


def check_pages(q: Tensor, pages: Pages, length: Length, form: HeadFormat | None = None) -> None:
    """Raise ValueError if q, the pages and the length do not match: the compiled kernels do not check them."""
    form = form or PlainHeads(q.shape[-1], q.dtype)
    rows, heads, queries, head_dim = q.shape
    kv_heads = pages[0][0].shape[1]
    if not queries or heads % kv_heads:
        raise ValueError(
            f"q has shape {tuple(q.shape)}: expected a query or more and a multiple of {kv_heads} heads"
        )
    if head_dim != form.head_dim:
        raise ValueError(f"q has shape {tuple(q.shape)}: the pages store heads of {form.head_dim}")
    total = 0
    for page in pages:
        tokens = page[0].shape[2]
        for x in page:
            if x.shape != (rows, kv_heads, tokens, form.width) or x.dtype is not form.dtype:
                raise ValueError(
                    f"a page has shape {tuple(x.shape)} and type {x.dtype}: expected "
                    f"{(rows, kv_heads, tokens, form.width)} and {form.dtype}"
                )
            if not x.is_contiguous() or x.device != q.device:
                raise ValueError(f"a page must be contiguous, on {q.device}")
        total += tokens
    if isinstance(length, Tensor):
        if length.shape != (rows,) or length.dtype is not torch.int64 or length.device != q.device:
            raise ValueError(f"lengths must be {rows} int64 values on {q.device}, one per row")
        if length.device.type == "cpu" and rows:
            by_row = length.tolist()  # see `longest`
            if not queries <= min(by_row) <= max(by_row) <= total:
                raise ValueError(
                    f"lengths {by_row}, but the pages have {total} tokens, {queries} of them new"
                )
    elif not queries <= length <= total:
        raise ValueError(f"length {length}, but the pages have {total} tokens, {queries} of them new")


def attend_in_torch(
    q: Tensor,
    pages: Pages,
    length: Length,
    starts: Tensor | None,
    scoring: Scoring,
    form: HeadFormat | None = None,
) -> Tensor:
    """`decode_attention` in torch, on every device, for one new token after another.

    Whole pages are multiplied because a batched product with a slice of a larger buffer is ten times slower
    on a CPU. The query heads that share a K/V head are the M dimension of the product, so K and V are read
    once. Plain memory beyond `length` is multiplied by zero probabilities. Encoded pages are decoded in pieces, up to
    `length`.
    """
    if q.shape[2] > 1:
        outs = [attend_in_torch(*one, starts, scoring, form) for one in _one_by_one(q, pages, length)]
        return torch.cat(outs, dim=2)
    probabilities = probabilities_in_torch(q, pages, length, starts, scoring, form).to(q.dtype)
    total = sum(k.shape[2] for k, _ in pages)
    return weigh_in_torch(probabilities, pages, longest(length, total), form).view(q.shape)


def part_in_torch(
    q: Tensor,
    pages: Pages,
    length: Length,
    starts: Tensor | None,
    scoring: Scoring,
    form: HeadFormat | None = None,
) -> Partial:
    """`decode_part` in torch, on every device; see `attend_in_torch`."""
    if q.shape[2] > 1:
        parts = [part_in_torch(*one, starts, scoring, form) for one in _one_by_one(q, pages, length)]
        return Partial(*(torch.cat(some, dim=2) for some in zip(*parts, strict=True)))
    scores = _scores_in_torch(q, pages, length, starts, scoring, form)
    probabilities, lse = softmax_part(scores, scoring.sinks)
    products = probabilities.to(q.dtype).view(-1, q.shape[1] // pages[0][0].shape[1], scores.shape[-1])
    most = longest(length, scores.shape[-1])
    return Partial(_sums_in_torch(products, pages, most, form).view(q.shape), lse)


def _one_by_one(q: Tensor, pages: Pages, length: Length) -> Iterator[tuple[Tensor, Pages, Length]]:
    """The query of each new token, with the pages and the length up to it."""
    for n, query in enumerate(q.split(1, dim=2), 1):
        yield query, pages, length - q.shape[2] + n


def attend_fused(
    q: Tensor, pages: Pages, positions: range, hidden: Tensor | None, scale: float, form: HeadFormat
) -> Tensor:
    """`decode_attention` of plain scores on a GPU with torch's fused attention: few launches at any length.

    positions: those that the new token attends to. hidden: `hidden_positions` in the dtype of q, for these positions
    and any number of later ones; None for no padding.

    Query heads that share a K/V head become queries of one head, so that keys are not expanded. Several pages are
    first joined, and encoded pages decoded, for a few rows at a time: the limits are `form.joined_bytes` and
    `form.rows_at_once`.
    """
    rows, heads, _, head_dim = q.shape
    keys = pages[0][0]
    kv_heads = keys.shape[1]
    query = q.reshape(rows, kv_heads, heads // kv_heads, head_dim)
    outs = []
    first = positions.start
    step = max(min(form.rows_at_once(keys, len(positions)), _rows_to_join(pages, form.joined_bytes)), 1)
    for begin in range(0, rows, step):
        part = slice(begin, begin + step)
        mask = None if hidden is None else hidden[part, :, :, : len(positions)]
        k, v = (form.whole(x[:, :, first:], len(positions), q.dtype) for x in join(pages, part))
        outs.append(F.scaled_dot_product_attention(query[part], k, v, attn_mask=mask, scale=scale))
        del k, v
    return (outs[0] if len(outs) == 1 else torch.cat(outs)).reshape(q.shape)


def join(pages: Pages, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """Keys and values of some rows in one page. Several pages are copied with two launches; one page is not
    copied."""
    if len(pages) == 1:
        return pages[0][0][rows], pages[0][1][rows]
    return torch.cat([k[rows] for k, _ in pages], dim=2), torch.cat([v[rows] for _, v in pages], dim=2)


def _rows_to_join(pages: Pages, joined_bytes: int) -> int:
    rows = max(len(pages[0][0]), 1)
    nbytes = sum(k.nbytes + v.nbytes for k, v in pages)
    return rows if len(pages) == 1 else joined_bytes * rows // max(nbytes, 1)


def join_bytes(rows: int, nbytes: int, form: HeadFormat) -> int:
    """Bytes that `attend_fused` allocates to join pages of `rows` rows and `nbytes` bytes in total."""
    return max(min(nbytes, form.joined_bytes), nbytes // max(rows, 1))


def hidden_positions(starts: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    """The mask of `attend_fused`, (rows, 1, 1, tokens): -inf for padding, otherwise 0.

    starts (rows,): as in `decode_attention`.
    """
    padding = torch.arange(align(tokens, MASK_ALIGNMENT), device=starts.device) < starts[:, None]
    hidden = torch.zeros(padding.shape, dtype=dtype, device=starts.device)
    return hidden.masked_fill_(padding, float("-inf"))[:, None, None, :tokens]


def hide_places(
    hidden: Tensor, starts: Tensor, length: Length, places: int, window: Window | None = None
) -> None:
    """Fill `hidden` (rows, 1, 1, >= places), a mask of `attend_fused` for a cache with `places` places.

    Place n stores the last of the first `length` positions that is n modulo `places`, if there is one. With this
    mask, attention over all places equals attention of the query at position length - 1, so the shape of the
    operation does not change with each token. starts (rows,): each row's first position that is not padding.
    """
    last: Length = length - 1 if isinstance(length, int) else length[:, None] - 1
    positions = last - (last - torch.arange(hidden.shape[-1], device=hidden.device)).remainder(places)
    first = starts if window is None else window.starts(starts, length)
    seen = positions >= first.clamp_min(0)[:, None]
    hidden.fill_(float("-inf"))[:, 0, 0].masked_fill_(seen, 0.0)


def hide_next_place(hidden: Tensor, length: Length, places: int, window: Window | None = None) -> None:
    """Change the mask of `hide_places` for `length` - 1 positions to that for `length`, in a few launches.

    Not for a window in chunks: when its chunk ends, a query hides many positions at once.
    """
    if isinstance(length, Tensor):
        by_row, last = hidden[:, 0, 0], length[:, None] - 1
        if window is not None:  # a place that is not used yet in rows that are shorter than the window
            by_row.scatter_(1, (last - window.size) % places, float("-inf"))
        by_row.scatter_(1, last % places, 0.0)
        return
    if window is not None and length > window.size:
        hidden[..., (length - 1 - window.size) % places].fill_(float("-inf"))
    hidden[..., (length - 1) % places].zero_()


def probabilities_in_torch(
    q: Tensor,
    pages: Pages,
    length: Length,
    starts: Tensor | None,
    scoring: Scoring,
    form: HeadFormat | None = None,
) -> Tensor:
    """Softmax of the scores, (rows * kv_heads, group, tokens of all pages) in float32; zero if no token is valid."""
    scores = _scores_in_torch(q, pages, length, starts, scoring, form)
    probabilities = softmax_with_sinks(scores, scoring.sinks)
    return probabilities.reshape(-1, q.shape[1] // pages[0][0].shape[1], scores.shape[-1])


def _scores_in_torch(
    q: Tensor,
    pages: Pages,
    length: Length,
    starts: Tensor | None,
    scoring: Scoring,
    form: HeadFormat | None,
) -> Tensor:
    """The scores (rows, heads, 1, tokens of all pages) in float32, without sinks; -inf for tokens that are hidden."""
    rows, heads, _, head_dim = q.shape
    form = form or PlainHeads(head_dim, q.dtype)
    kv_heads = pages[0][0].shape[1]
    group = heads // kv_heads
    # q is scaled before the product, because the product could overflow in float16.
    query = (q * scoring.scale).reshape(rows * kv_heads, group, head_dim)
    total = sum(k.shape[2] for k, _ in pages)
    RESULT_MEMORY.return_unused()
    scores = torch.empty(rows * kv_heads, group, total, dtype=torch.float32, device=q.device)
    most = longest(length, total)
    for begin, part in _decoded([k for k, _ in pages], most, form, q.dtype):
        keys = part.view(rows * kv_heads, part.shape[2], head_dim)
        scores[:, :, begin : begin + keys.shape[1]] = torch.bmm(query, keys.transpose(1, 2))
    by_head = scores.view(rows, heads, 1, total)
    if scoring.cap is not None:
        capped(by_head, scoring.cap)
    if scoring.slopes:
        last: range | Tensor = range(length - 1, length) if isinstance(length, int) else length - 1
        bend(by_head, scoring.slopes, last, range(total))
    scores[:, :, most:] = float("-inf")
    if isinstance(length, Tensor):
        beyond = torch.arange(total, device=q.device) >= length[:, None]
        by_head.masked_fill_(beyond[:, None, None], float("-inf"))
    starts = visible_from(scoring.window, starts, length, rows, q.device)
    if starts is not None:
        padding = torch.arange(total, device=q.device) < starts.to(q.device)[:, None]
        by_head.masked_fill_(padding[:, None, None], float("-inf"))
    return by_head


def weigh_in_torch(
    probabilities: Tensor, pages: Pages, length: int | None = None, form: HeadFormat | None = None
) -> Tensor:
    """Sums of values, weighted by probabilities (rows * kv_heads, group, tokens), in the dtype of these.

    Returns (..., group, head_dim). Decodes only the first `length` tokens of encoded pages.
    """
    return _sums_in_torch(probabilities, pages, length, form).to(probabilities.dtype)


def _sums_in_torch(
    probabilities: Tensor, pages: Pages, length: int | None, form: HeadFormat | None
) -> Tensor:
    """`weigh_in_torch` in float32."""
    items, group, tokens = probabilities.shape
    form = form or PlainHeads(pages[0][1].shape[3], probabilities.dtype)
    out = torch.zeros(items, group, form.head_dim, dtype=torch.float32, device=probabilities.device)
    for begin, part in _decoded([v for _, v in pages], length or tokens, form, probabilities.dtype):
        values = part.view(items, part.shape[2], form.head_dim)
        out += torch.bmm(probabilities[:, :, begin : begin + values.shape[1]], values)
    return out


def _decoded(
    stored: Sequence[Tensor], length: int, form: HeadFormat, dtype: torch.dtype
) -> Iterator[tuple[int, Tensor]]:
    """The keys or the values of at least `length` tokens, in runs, with the first position of each run."""
    begin = 0
    for page in stored:
        position = begin
        for part in form.decode(page, max(0, length - begin), dtype):
            yield position, part
            position += part.shape[2]
        begin += page.shape[2]
