"""Stores the key and value of one new token of each row in its page. On a CPU, one compiled call copies both."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from flexgen.kernels.heads import Pages
from flexgen.kernels.loading import announce, native


def store_token(pages: Pages, position: int, k: Tensor, v: Tensor) -> None:
    """Write k and v (rows, kv_heads, 1, width), in their stored form, to place `position` of the pages.

    All pages have the same number of tokens.
    """
    alike = k.dtype is v.dtype is pages[0][0].dtype and k.stride(3) == v.stride(3) == 1
    if alike and k.device.type == "cpu" and announce():
        return store_token_natively(pages, position, k, v)
    store_token_in_torch(pages, position, k, v)


def store_token_natively(pages: Pages, position: int, k: Tensor, v: Tensor) -> None:
    """`store_token` with the compiled kernel."""
    rows, heads, _, width = k.shape
    item = k.itemsize
    native.store_token(
        (rows, heads, pages[0][0].shape[2], width * item),
        position,
        k.data_ptr(),
        (k.stride(0) * item, k.stride(1) * item),
        _addresses([keys for keys, _ in pages]),
        v.data_ptr(),
        (v.stride(0) * item, v.stride(1) * item),
        _addresses([values for _, values in pages]),
    )


def _addresses(pages: Sequence[Tensor]) -> list[int]:
    return [page.data_ptr() for page in pages]


def store_token_in_torch(pages: Pages, position: int, k: Tensor, v: Tensor) -> None:
    """`store_token` in torch, on every device."""
    page, place = divmod(position, pages[0][0].shape[2])
    for target, source in zip(pages[page], (k, v), strict=True):
        target.narrow(2, place, 1).copy_(source)
