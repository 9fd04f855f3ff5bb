"""Pages of the KV cache as tensors: writes and reads of tokens' keys and values, and attention over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flexgen.kernels.attention import attend_fused, decode_attention, decode_part, join
from flexgen.kernels.heads import HeadFormat
from flexgen.kernels.new_tokens import store_tokens
from flexgen.kernels.partial import Partial
from flexgen.kernels.scoring import Scoring
from flexgen.kernels.sparse_attention import Choice, attend_chosen, choose
from flexgen.layout.cache import CacheSegment
from flexgen.memory.store import tensor_at
from flexgen.models.ops import causal_attention, causal_part
from flexgen.runtime.attention_outputs import AttentionOutput
from flexgen.runtime.cell import BoundCell

Page = tuple[Tensor, Tensor]
"""Stored keys and values, each (rows, kv_heads, page_tokens, heads.width): the halves of one tensor."""


def pages_in(buffer: Tensor, segment: CacheSegment) -> list[Page]:
    """The pages of `segment` in `buffer` (bytes)."""
    starts = range(0, buffer.numel() - segment.page_bytes + 1, segment.page_bytes)
    both = [tensor_at(buffer, start, segment.page_shape, segment.heads.dtype) for start in starts]
    return [(page[0], page[1]) for page in both]


def put(pages: Sequence[Page], position: int, k: Tensor, v: Tensor) -> None:
    """Write k and v (rows, kv_heads, tokens, width), in their stored form, to the pages from token `position` on.

    Page n is at index n % len(pages). At most that number of pages is written: the last ones.
    """
    page_tokens, tokens = pages[0][0].shape[2], k.shape[2]
    if tokens == 1 and not k.is_cuda:
        number, place = divmod(position, page_tokens)
        store_tokens([pages[number % len(pages)]], place, k, v)
        return
    first = (position + tokens - 1) // page_tokens - len(pages) + 1
    done = max(first * page_tokens - position, 0)
    while done < tokens:
        number, begin = divmod(position + done, page_tokens)
        page = number % len(pages)
        count = min(page_tokens - begin, tokens - done)
        sources = (k, v) if count == tokens else [x.narrow(2, done, count) for x in (k, v)]
        if k.is_cuda and _adjacent(pages[page]):
            torch.cat(sources, out=_whole(pages[page]).narrow(2, begin, count))  # one launch
        else:
            for target, source in zip(pages[page], sources, strict=True):
                target.narrow(2, begin, count).copy_(source)
        done += count


def put_at(pages: Sequence[Page], index: Tensor, k: Tensor, v: Tensor) -> None:
    """`put` for one token of each row, or for several with an index of three dimensions.

    index: the page and the place in it, int64 on the device of the pages: (2,) for all rows, (2, rows), or
    (2, rows, tokens).
    """
    both = torch.cat((k, v))
    first = _whole(pages[0])
    if index.dim() == 1 and len(pages) == 1:
        first.index_copy_(2, index[1:], both)
        return
    apart = pages[1][0].storage_offset() - pages[0][0].storage_offset() if len(pages) > 1 else 0
    every = first.as_strided((len(pages), *first.shape), (apart, *first.stride()))
    if index.dim() == 1:
        every.movedim(3, 1).index_put_((index[:1], index[1:]), both.movedim(2, 0))
        return
    page, place = torch.cat((index, index), dim=1)
    row = torch.arange(len(both), device=both.device)
    if index.dim() == 2:
        both = both.squeeze(2)
    else:
        row, both = row[:, None], both.transpose(1, 2)
    every.permute(0, 1, 3, 2, 4).index_put_((page, row, place), both)


def put_by_row(pages: Sequence[Page], lengths: Tensor, k: Tensor, v: Tensor) -> None:
    """`put` for rows with different numbers of cached tokens, `lengths` (rows,) int64 in host memory. The pages have
    all tokens."""
    if k.device.type == "cpu":
        store_tokens(pages, lengths, k, v)
        return
    positions = lengths.to(k.device)[:, None] + torch.arange(k.shape[2], device=k.device)
    page_tokens = pages[0][0].shape[2]
    put_at(pages, torch.stack((positions // page_tokens, positions % page_tokens)), k, v)


def _adjacent(page: Page) -> bool:
    """Whether the page has all rows of the memory in which it is stored, so that its values follow its keys."""
    k, v = page
    return bool(v.storage_offset() - k.storage_offset() == k.numel())


def _whole(page: Page) -> Tensor:
    """(2 * rows, kv_heads, page_tokens, width): the keys of a page, followed by its values."""
    k, v = page
    rows, apart = len(k), v.storage_offset() - k.storage_offset()
    assert apart == k.numel() and k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    return k.as_strided((2 * rows, *k.shape[1:]), k.stride())


def copy_row(source: Sequence[Page], row: int, target: Sequence[Page], place: int, tokens: int) -> None:
    """Copy the first `tokens` stored tokens of a row to another place, in pages of the same form."""
    for (_, *held), (_, *room) in zip(_parts(source, 0, tokens), _parts(target, 0, tokens), strict=True):
        for part, there in zip(held, room, strict=True):
            there[place].copy_(part[row])


def pick(
    pages: Sequence[Page], rows: Sequence[int], begin: int, end: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Copies of stored k and v (rows, kv_heads, tokens, width) for some rows, from token `begin` to `end`.

    Yields them page by page, each with the number of its first token.
    """
    index = torch.tensor(rows, device=pages[0][0].device)
    for position, k, v in _parts(pages, begin, end):
        yield position, k.index_select(0, index), v.index_select(0, index)


def _parts(pages: Sequence[Page], begin: int, end: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Views of k and v from token `begin` to `end`, page by page, each with the number of its first token."""
    page_tokens = pages[0][0].shape[2]
    while begin < end:
        number, first = divmod(begin, page_tokens)
        last = min(first + end - begin, page_tokens)
        k, v = pages[number % len(pages)]
        yield begin, k[:, :, first:last], v[:, :, first:last]
        begin += last - first


class Stretch(NamedTuple):
    """Pages in the order of their tokens, from position `base` on."""

    pages: Sequence[Page]
    base: int


def stretch(pages: Sequence[Page], page_tokens: int, first: int, length: int) -> Stretch:
    """The pages with the positions from `first` up to `length`. Page n is at index n % len(pages)."""
    numbers = range(first // page_tokens, -(-length // page_tokens))
    return Stretch([pages[n % len(pages)] for n in numbers], numbers.start * page_tokens)


def joined(pages: Sequence[Page], first: int, length: int, k: Tensor, v: Tensor) -> Stretch:
    """A copy of the tokens from `first` up to `length`, followed by k and v in their stored form, as one page."""
    old = list(_parts(pages, first, length))
    keys = torch.cat([*(part for _, part, _ in old), k], dim=2)
    values = torch.cat([*(part for _, _, part in old), v], dim=2)
    return Stretch([(keys, values)], first)


Bring = Callable[[Choice], object]
"""Reads the chosen values to the pages."""


def attend(
    pages: Sequence[Page],
    cell: BoundCell,
    segment: CacheSegment,
    q: Tensor,
    scoring: Scoring,
    bring: Bring | None = None,
) -> AttentionOutput:
    """Attention of one new token of the segment's rows, over pages that include this token.

    q and the result are (rows, heads, 1, head_dim), for these rows; with guesses, they have all new tokens. If the
    cell has a prefix, the result is a part.
    bring: reads chosen values that are not in the pages yet.
    """
    if cell.guesses is not None:
        return attend_by_row(pages, cell, segment, q, scoring)
    if cell.prefix is not None:
        return attend_part(pages, cell, segment, q, scoring)
    length, padding = cell.span.length + cell.span.new, cell.padding.before(cell.span.length)
    first = padding.first_visible(segment.rows, scoring.window, length - 1)
    pages, base = stretch(pages, segment.page_tokens, first, length)
    starts = padding.of(segment.rows, q.device, base)
    if q.is_cuda and not segment.sparse and scoring.plain:
        attention = segment.heads.attend(q, pages, length - base, starts, scoring)
        if attention is not None:
            return attention
        if scoring.window is None:
            hidden = padding.hidden(segment.rows, segment.capacity, q.dtype)
        else:
            hidden = padding.hidden_in(scoring.window, segment.rows, range(first, length), q.dtype)
        return attend_fused(
            q, pages, range(first - base, length - base), hidden, scoring.scale, segment.heads
        )
    if q.is_cuda:
        pages = [join(pages)]  # launches per page would take longer
    if not segment.sparse:
        return decode_attention(q, pages, length - base, starts, scoring, segment.heads)
    choice = choose(q, pages, length, starts, scoring, segment.sparsity)
    if bring is not None:
        bring(choice)
    return attend_chosen(choice, pages)


def attend_part(
    pages: Sequence[Page], cell: BoundCell, segment: CacheSegment, q: Tensor, scoring: Scoring
) -> Partial:
    """`attend` as a part of the attention over more tokens. The segment is not sparse."""
    length, padding = cell.span.length + cell.span.new, cell.padding.before(cell.span.length)
    first = padding.first_visible(segment.rows, scoring.window, length - 1)
    pages, base = stretch(pages, segment.page_tokens, first, length)
    if q.is_cuda:
        pages = [join(pages)]  # launches per page would take longer
    starts = padding.of(segment.rows, q.device, base)
    return decode_part(q, pages, length - base, starts, scoring, segment.heads)


def attend_by_row(
    pages: Sequence[Page], cell: BoundCell, segment: CacheSegment, q: Tensor, scoring: Scoring
) -> AttentionOutput:
    """`attend` for rows with different numbers of cached tokens. The pages have all tokens, and q and the result
    (rows, heads, new, head_dim) the new ones."""
    lengths = cell.contexts(segment.rows).to(q.device) + q.shape[2]
    kernel = decode_attention if cell.prefix is None else decode_part
    return kernel(q, pages, lengths, cell.padding.of(segment.rows, q.device), scoring, segment.heads)


@dataclass(frozen=True)
class Fixed:
    """The position of one new token of each row in tensors on the device, for attention in a CUDA graph.

    `index` (2,) int64 is that of `put_at`. `hidden` is the mask of `attend_fused` for the places of all pages.
    Attention is over the first `extent` places.
    """

    index: Tensor
    hidden: Tensor
    extent: int


def attend_fixed(pages: Sequence[Page], at: Fixed, heads: HeadFormat, q: Tensor, scoring: Scoring) -> Tensor:
    """`attend` for the new token, q (rows, heads, 1, head_dim), over pages with its keys and values (`put_at`)."""
    return attend_fused(q, pages, range(at.extent), at.hidden, scoring.scale, heads)


def attend_several(
    cached: Stretch, heads: HeadFormat, q: Tensor, starts: Sequence[int], length: int, scoring: Scoring
) -> Tensor:
    """Exact causal attention of several tokens of some rows, over pages with these rows and tokens.

    q and the result are (rows, heads, new, head_dim), for the last `new` of the first `length` positions. The result
    is zero for padding. starts: each row's first position that is not padding.
    It computes row by row, which limits the joined and decoded pages (`CacheSegment.extending_bytes`).
    """
    count, query_heads, new, head_dim = q.shape
    # Stored by token, so that merging the heads afterwards is a view.
    out = q.new_empty(count, new, query_heads, head_dim).transpose(1, 2)
    for row, k, v in _row_by_row(cached, heads, q, length):
        out[row] = causal_attention(q[row], k, v, (starts[row.start] - cached.base,), scoring)
    return out


def several_part(
    cached: Stretch, heads: HeadFormat, q: Tensor, starts: Sequence[int], length: int, scoring: Scoring
) -> Partial:
    """`attend_several` as a part of the attention over more tokens."""
    rows = [
        causal_part(q[row], k, v, (starts[row.start] - cached.base,), scoring)
        for row, k, v in _row_by_row(cached, heads, q, length)
    ]
    return Partial(torch.cat([row.values for row in rows]), torch.cat([row.lse for row in rows]))


def _row_by_row(
    cached: Stretch, heads: HeadFormat, q: Tensor, length: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The decoded keys and values of each row up to `length`, in the dtype of q."""
    for n in range(len(q)):
        row = slice(n, n + 1)
        k, v = (heads.whole(x, length - cached.base, q.dtype) for x in join(cached.pages, row))
        yield row, k, v
