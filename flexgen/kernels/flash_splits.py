"""The memory that FlashAttention allocates when it splits the keys of a prompt among idle multiprocessors.

Each split of the keys has its own result in float32. These functions mirror torch's choice of the number of splits
(`num_splits_heuristic` in `flash_api.cpp`).
"""

from __future__ import annotations

from functools import cache

import torch

_QUERIES = 64
"""Queries per block."""
_MOST_SPLITS = 128
_BUSY = 0.8
"""Keys are not split if blocks occupy at least this share of the places."""
_EFFICIENT = 0.85
"""The smallest number of splits that reaches this share of the best use of the places is chosen."""


@cache
def split_bytes(rows: int, heads: int, tokens: int, head_dim: int, multiprocessors: int) -> int:
    """The maximum bytes of the splits' results and sums in causal attention, in addition to its result.

    Attention is called for runs of adjacent rows with equal padding. So this is the maximum over all runs of up to
    `rows` rows and up to `tokens` tokens: smaller runs leave more multiprocessors idle.
    """
    places = 2 * multiprocessors
    each = (_padded(head_dim) + 1) * torch.float32.itemsize
    most = 0
    for length in range(1, -(-tokens // _QUERIES) + 1):  # in blocks
        if heads * length >= _BUSY * places:
            break
        some = min(length * _QUERIES, tokens)
        for run in range(1, rows + 1):
            splits = _splits(run * heads * length, -(-some // _keys(head_dim)), places)
            if splits > 1:
                most = max(most, splits * run * heads * some * each)
    return most


def _padded(head_dim: int) -> int:
    """Values per head in the results."""
    return next((n for n in (32, 64, 96, 128, 192) if head_dim <= n), 256)


def _keys(head_dim: int) -> int:
    """Keys per block."""
    return 256 if head_dim <= 64 else 128 if head_dim <= 128 else 64


@cache
def _splits(blocks: int, key_blocks: int, places: int) -> int:
    """The number of splits of `key_blocks` blocks of keys, for `blocks` blocks of queries of all heads."""
    if blocks >= _BUSY * places:
        return 1

    def used(splits: int) -> float:
        """The share of places in use, or 0 if one split less has splits of the same length."""
        if splits > 1 and -(-key_blocks // splits) == -(-key_blocks // (splits - 1)):
            return 0.0
        full = blocks * splits
        return full / (-(-full // places) * places)

    shares = [used(splits) for splits in range(1, min(_MOST_SPLITS, places, key_blocks) + 1)]
    return next(n for n, share in enumerate(shares, 1) if share >= _EFFICIENT * max(shares))
