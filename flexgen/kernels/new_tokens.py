"""Stores the keys and values of new tokens in their pages. On a CPU, one compiled call copies both."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from flexgen.kernels.heads import Pages
from flexgen.kernels.loading import announce, native
from flexgen.kernels.scoring import Length


def store_tokens(pages: Pages, length: Length, k: Tensor, v: Tensor) -> None:
    """Write k and v (rows, kv_heads, new, width), in their stored form, to the pages after `length` cached tokens.

    All pages have the same number of tokens, and room for the new ones. Lengths of rows are int64 on the CPU.
    """
    alike = k.dtype is v.dtype is pages[0][0].dtype and k.stride(3) == v.stride(3) == 1
    if alike and k.device.type == "cpu" and announce():
        return store_tokens_natively(pages, length, k, v)
    store_tokens_in_torch(pages, length, k, v)


def store_tokens_natively(pages: Pages, length: Length, k: Tensor, v: Tensor) -> None:
    """`store_tokens` with the compiled kernel."""
    rows, heads, new, width = k.shape
    lengths = length.contiguous() if isinstance(length, Tensor) else None
    native.store_tokens(
        (rows, heads, new, pages[0][0].shape[2], width * k.itemsize),
        length if isinstance(length, int) else 0,
        0 if lengths is None else lengths.data_ptr(),
        k.data_ptr(),
        _strides(k),
        _addresses([keys for keys, _ in pages]),
        v.data_ptr(),
        _strides(v),
        _addresses([values for _, values in pages]),
    )


def _strides(x: Tensor) -> tuple[int, int, int]:
    row, head, token, _ = (stride * x.itemsize for stride in x.stride())
    return row, head, token


def _addresses(pages: Sequence[Tensor]) -> list[int]:
    return [page.data_ptr() for page in pages]


def store_tokens_in_torch(pages: Pages, length: Length, k: Tensor, v: Tensor) -> None:
    """`store_tokens` in torch, on every device."""
    rows, _, new, _ = k.shape
    page_tokens = pages[0][0].shape[2]
    lengths = length.tolist() if isinstance(length, Tensor) else [length] * rows
    if len(set(lengths)) > 1:
        for row, own in enumerate(lengths):
            some = slice(row, row + 1)
            store_tokens_in_torch(
                [(keys[some], values[some]) for keys, values in pages], own, k[some], v[some]
            )
        return
    for token in range(new if lengths else 0):
        page, place = divmod(lengths[0] + token, page_tokens)
        for target, source in zip(pages[page], (k, v), strict=True):
            target.narrow(2, place, 1).copy_(source.narrow(2, token, 1))
