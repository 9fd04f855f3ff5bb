"""Pages of the KV cache as tensors: writes and reads of tokens' keys and values, and attention over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexgen.kernels.attention import attend_fused, decode_attention, join
from flexgen.kernels.heads import HeadFormat
from flexgen.kernels.scoring import Scoring
from flexgen.kernels.sparse_attention import Choice, attend_chosen, choose
from flexgen.layout.cache import CacheSegment
from flexgen.memory.store import tensor_at
from flexgen.models.ops import causal_attention
from flexgen.runtime.cell import BoundCell

Page = tuple[Tensor, Tensor]
"""Stored keys and values, each (rows, kv_heads, page_tokens, heads.width): the halves of one tensor."""


def pages_in(buffer: Tensor, segment: CacheSegment) -> list[Page]:
    """The pages of `segment` in `buffer` (bytes)."""
    starts = range(0, buffer.numel() - segment.page_bytes + 1, segment.page_bytes)
    both = [tensor_at(buffer, start, segment.page_shape, segment.heads.dtype) for start in starts]
    return [(page[0], page[1]) for page in both]


def put(pages: Sequence[Page], position: int, k: Tensor, v: Tensor) -> None:
    """Write k and v (rows, kv_heads, tokens, width), in their stored form, to the pages from token `position` on."""
    page_tokens, tokens, done = pages[0][0].shape[2], k.shape[2], 0
    while done < tokens:
        page, begin = divmod(position + done, page_tokens)
        count = min(page_tokens - begin, tokens - done)
        sources = [x[:, :, done : done + count] for x in (k, v)]
        if k.is_cuda:
            torch.cat(sources, out=_whole(pages[page])[:, :, begin : begin + count])  # one launch
        else:
            for target, source in zip(pages[page], sources, strict=True):
                target[:, :, begin : begin + count] = source
        done += count


def put_at(page: Page, position: Tensor, k: Tensor, v: Tensor) -> None:
    """`put` for one token of each row of a page, at `position` (1,) int64 on the page's device."""
    _whole(page).index_copy_(2, position, torch.cat((k, v)))


def _whole(page: Page) -> Tensor:
    """(2 * rows, kv_heads, page_tokens, width): the keys of a page, followed by its values."""
    k, v = page
    rows, apart = len(k), v.storage_offset() - k.storage_offset()
    assert apart == k.numel() and k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    return k.as_strided((2 * rows, *k.shape[1:]), k.stride())


def pick(
    pages: Sequence[Page], rows: Sequence[int], begin: int, end: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Copies of stored k and v (rows, kv_heads, tokens, width) for some rows, from token `begin` to `end`.

    Yields them page by page, each with the number of its first token.
    """
    page_tokens = pages[0][0].shape[2]
    index = torch.tensor(rows, device=pages[0][0].device)
    while begin < end:
        page, first = divmod(begin, page_tokens)
        last = min(first + end - begin, page_tokens)
        k, v = (x[:, :, first:last].index_select(0, index) for x in pages[page])
        yield begin, k, v
        begin += last - first


Bring = Callable[[Choice], object]
"""Reads the chosen values to the pages."""


def attend(
    pages: Sequence[Page],
    cell: BoundCell,
    segment: CacheSegment,
    q: Tensor,
    scoring: Scoring,
    bring: Bring | None = None,
) -> Tensor:
    """Attention of one new token of the segment's rows, over pages that include this token.

    q and the result are (rows, heads, 1, head_dim), for these rows. bring: reads chosen values that are not in the
    pages yet.
    """
    length, padding = cell.span.length + cell.span.new, cell.padding.before(cell.span.length)
    first = padding.first_visible(segment.rows, scoring.window, length - 1)
    pages, base = _read(pages, segment, first, length)
    starts = padding.of(segment.rows, q.device, base)
    if q.is_cuda and not segment.sparse and scoring.plain:
        attention = segment.heads.attend(q, pages, length - base, starts, scoring)
        if attention is not None:
            return attention
        positions = range(first - base, length - base)
        hidden = padding.hidden(segment.rows, segment.capacity, q.dtype, scoring.window, length)
        hidden = hidden if hidden is None else hidden[..., base:]
        return attend_fused(q, pages, positions, hidden, scoring.scale, segment.heads)
    if q.is_cuda:
        pages = [join(pages)]  # launches per page would take longer
    if not segment.sparse:
        return decode_attention(q, pages, length - base, starts, scoring, segment.heads)
    choice = choose(q, pages, length, starts, scoring, segment.sparsity)
    if bring is not None:
        bring(choice)
    return attend_chosen(choice, pages)


def _read(
    pages: Sequence[Page], segment: CacheSegment, first: int, length: int
) -> tuple[Sequence[Page], int]:
    """The pages with positions `first` to `length`, in order, and the position of their first token."""
    page_tokens = segment.page_tokens
    begin = first // page_tokens
    return pages[begin : -(-length // page_tokens)], begin * page_tokens


@dataclass(frozen=True)
class Fixed:
    """The position of one new token of each row in tensors on the device, for attention in a CUDA graph.

    `index` (1,) int64 is the position. `hidden` is the mask of `attend_fused` for all positions up to it. Attention
    is over `extent` positions.
    """

    index: Tensor
    hidden: Tensor
    extent: int


def attend_fixed(page: Page, at: Fixed, heads: HeadFormat, q: Tensor, scoring: Scoring) -> Tensor:
    """`attend` for the new token, q (rows, heads, 1, head_dim), over a page with its keys and values (`put_at`)."""
    return attend_fused(q, [page], range(at.extent), at.hidden, scoring.scale, heads)


def attend_several(
    pages: Sequence[Page],
    segment: CacheSegment,
    q: Tensor,
    starts: Sequence[int],
    length: int,
    scoring: Scoring,
) -> Tensor:
    """Exact causal attention of several tokens of some rows, over pages with these rows and tokens.

    q and the result are (rows, heads, new, head_dim), for the last `new` of the first `length` positions. The result
    is zero for padding. starts: each row's first position that is not padding.
    It computes row by row, which limits the joined and decoded pages (`CacheSegment.extending_bytes`).
    """
    count, heads, new, head_dim = q.shape
    # Stored by token, so that merging the heads afterwards is a view.
    out = q.new_empty(count, new, heads, head_dim).transpose(1, 2)
    for n, start in enumerate(starts):
        row, window, query = slice(n, n + 1), scoring.window, max(length - new - start, 0)
        first = 0 if window is None else window.first(query) + start
        read, base = _read(pages, segment, first, length)
        k, v = (segment.heads.whole(x, length - base, q.dtype) for x in join(read, row))
        out[row] = causal_attention(q[row], k, v, (start - base,), scoring)
    return out
