"""Pages of the KV cache as tensors: where a token's keys and values lie in them, and which tokens a step has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flexgen.kernels.attention import attend_fused, decode_attention, hidden_positions, join
from flexgen.kernels.heads import HeadFormat
from flexgen.kernels.sparse_attention import Choice, attend_chosen, choose
from flexgen.layout.cache import CacheSegment, Span
from flexgen.memory.store import tensor_at
from flexgen.models.ops import causal_attention

Page = tuple[Tensor, Tensor]
"""Keys and values as they are kept, each (rows, kv_heads, page_tokens, heads.width): halves of one tensor."""


def pages_in(buffer: Tensor, segment: CacheSegment) -> list[Page]:
    """The pages of `segment` that lie in `buffer` (bytes)."""
    starts = range(0, buffer.numel() - segment.page_bytes + 1, segment.page_bytes)
    both = [tensor_at(buffer, start, segment.page_shape, segment.heads.dtype) for start in starts]
    return [(page[0], page[1]) for page in both]


def put(pages: Sequence[Page], position: int, k: Tensor, v: Tensor) -> None:
    """Write k and v, as they are kept, (rows, kv_heads, tokens, width), into the pages from token `position` on."""
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
    """`put` of one token of each row into a page, where `position` (1,) int64 on the page's device tells."""
    _whole(page).index_copy_(2, position, torch.cat((k, v)))


@dataclass(frozen=True)
class Fixed:
    """One new token of each row, where tensors on the device tell, so that a CUDA graph serves any token.

    `index` (1,) int64 is its position. `hidden` is the mask of `attend_fused`, of all tokens up to the new one.
    Attention is over `extent` positions.
    """

    index: Tensor
    hidden: Tensor
    extent: int


def attend_fixed(
    page: Page, at: Fixed, q: Tensor, k: Tensor, v: Tensor, heads: HeadFormat, scale: float
) -> Tensor:
    """Put the new keys and values (rows, kv_heads, 1, head_dim) into the page; `attend` over it, on a GPU."""
    put_at(page, at.index, *heads.encode_both(k, v))
    return attend_fused(q, [page], at.extent, at.hidden, scale, heads)


def _whole(page: Page) -> Tensor:
    """(2 * rows, kv_heads, page_tokens, width): the keys of a page and behind them its values."""
    k, v = page
    rows, apart = len(k), v.storage_offset() - k.storage_offset()
    assert apart == k.numel() and k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    return k.as_strided((2 * rows, *k.shape[1:]), k.stride())


def pick(
    pages: Sequence[Page], rows: Sequence[int], begin: int, end: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Copies of k and v (rows, kv_heads, tokens, width), as they are kept, of some rows; from token `begin` to `end`.

    Page by page, each with the number of its first token.
    """
    page_tokens = pages[0][0].shape[2]
    index = torch.tensor(rows, device=pages[0][0].device)
    while begin < end:
        page, first = divmod(begin, page_tokens)
        last = min(first + end - begin, page_tokens)
        k, v = (x[:, :, first:last].index_select(0, index) for x in pages[page])
        yield begin, k, v
        begin += last - first


@dataclass(frozen=True)
class Padding:
    """Left padding of a batch: how many positions before each row's first token."""

    starts: tuple[int, ...]
    on_device: Tensor
    on_host: Tensor
    _hidden: dict[tuple[range, int, torch.dtype], Tensor] = field(
        default_factory=dict, repr=False, compare=False
    )

    @property
    def any(self) -> bool:
        return any(self.starts)

    def of(self, rows: range, device: torch.device) -> Tensor | None:
        """(rows,) for attention on `device`, or None without padding."""
        if not self.any:
            return None
        return (self.on_host if device.type == "cpu" else self.on_device)[rows.start : rows.stop]

    def hidden(self, rows: range, tokens: int, dtype: torch.dtype) -> Tensor | None:
        """The mask of `attend_fused` for attention on the device, or None without padding. It is made once."""
        if not self.any:
            return None
        key = rows, tokens, dtype
        if key not in self._hidden:
            starts = self.on_device[rows.start : rows.stop]
            self._hidden[key] = hidden_positions(starts, tokens, dtype)
        return self._hidden[key]

    def before(self, length: int) -> Padding:
        """The same for attention over more than `length` positions: rows that are all padding so far get one of it,
        because attention over no position is not a number. What they get is not used."""
        if not self.any or max(self.starts) <= length:
            return self
        starts = tuple(min(start, length) for start in self.starts)
        return Padding(starts, self.on_device.clamp_max(length), self.on_host.clamp_max(length))


Bring = Callable[[Choice], object]
"""Brings the values that were chosen into the pages."""


def attend(
    pages: Sequence[Page],
    span: Span,
    q: Tensor,
    segment: CacheSegment,
    padding: Padding,
    scale: float,
    bring: Bring | None = None,
) -> Tensor:
    """Attention of the one new token of the segment's rows, q (rows, heads, 1, head_dim), over pages that hold it.

    `bring` is for values that are not in the pages before they are chosen.
    """
    length, padding = span.length + span.new, padding.before(span.length)
    pages = pages[: -(-length // segment.page_tokens)]
    starts = padding.of(segment.rows, q.device)
    if q.is_cuda and not segment.sparse:
        attended = segment.heads.attend(q, pages, length, starts, scale)
        if attended is not None:
            return attended
        hidden = padding.hidden(segment.rows, segment.pages * segment.page_tokens, q.dtype)
        return attend_fused(q, pages, length, hidden, scale, segment.heads)
    if q.is_cuda:
        pages = [join(pages)]  # what is launched for each page would take longer
    if not segment.sparse:
        return decode_attention(q, pages, length, starts, scale, segment.heads)
    choice = choose(q, pages, length, starts, scale, segment.attn_sparsity, segment.choice_tokens)
    if bring is not None:
        bring(choice)
    return attend_chosen(choice, pages)


def attend_several(
    pages: Sequence[Page],
    length: int,
    q: Tensor,
    segment: CacheSegment,
    rows: range,
    padding: Padding,
    scale: float,
) -> Tensor:
    """Exact causal attention of several tokens of some of the segment's rows, over pages that hold them.

    q (len(rows), heads, new, head_dim) of the last of the first `length` positions, as is the result; it is zero at
    padding.
    Row by row, which bounds what is joined and decoded (`CacheSegment.extending_bytes`).
    """
    pages = pages[: -(-length // segment.page_tokens)]
    count, heads, new, head_dim = q.shape
    # Laid out by token, so that merging the heads afterwards is a view.
    out = q.new_empty(count, new, heads, head_dim).transpose(1, 2)
    for n, row in enumerate(rows):
        place = row - segment.rows.start
        both = join(pages, slice(place, place + 1))
        k, v = (segment.heads.whole(x, length, q.dtype) for x in both)
        out[n : n + 1] = causal_attention(q[n : n + 1], k, v, padding.starts[row : row + 1], scale)
    return out
