"""Into how many parts FlashAttention divides keys. The figures are those that torch 2.13 allocates."""

import pytest

from flexgen.kernels.flash_splits import split_bytes


def of_parts(parts, rows, heads, tokens, padded):
    return parts * rows * heads * tokens * (padded + 1) * 4


@pytest.mark.parametrize(
    ("rows", "heads", "tokens", "head_dim", "multiprocessors", "taken"),
    [
        (1, 4, 1024, 64, 132, of_parts(4, 1, 4, 1024, 64)),
        (1, 4, 1024, 64, 108, of_parts(2, 1, 4, 1024, 64)),
        (3, 8, 256, 128, 132, of_parts(2, 3, 8, 256, 128)),
        (3, 8, 256, 256, 132, of_parts(2, 3, 8, 256, 256)),
        (4, 2, 130, 80, 128, of_parts(2, 4, 2, 130, 96)),
        (2, 1, 1000, 160, 128, of_parts(8, 2, 1, 1000, 192)),
        (1, 256, 4096, 128, 132, 0),  # all multiprocessors are busy
        (1, 4, 128, 128, 132, 0),  # one block of keys
    ],
)
def test_parts_take(rows, heads, tokens, head_dim, multiprocessors, taken):
    assert split_bytes(rows, heads, tokens, head_dim, multiprocessors) >= taken
    assert (taken > 0) == (split_bytes(rows, heads, tokens, head_dim, multiprocessors) > 0)


def test_fewer_rows_of_a_batch_may_take_more_than_all():
    """Runs of equal padding are computed apart."""
    assert split_bytes(64, 32, 256, 128, 132) == split_bytes(3, 32, 256, 128, 132) > 0
