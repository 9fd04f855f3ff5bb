"""How much memory FlashAttention takes where it divides the keys of a prompt among idle multiprocessors.

Each part of the keys then has a result of its own in float32. torch's `flash_api.cpp` (`num_splits_heuristic`) says
into how many parts; these functions mirror it.
"""

from __future__ import annotations

from functools import cache

import torch

_QUERIES = 64
"""Queries of a block."""
_MOST_SPLITS = 128
_BUSY = 0.8
"""Share of the places for blocks from which on keys are not divided."""
_EFFICIENT = 0.85
"""Of the best use of the places: the smallest number of parts that reaches it is taken."""


@cache
def split_bytes(rows: int, heads: int, tokens: int, head_dim: int, multiprocessors: int) -> int:
    """The most that causal attention takes for the results of parts, with their sums, in addition to its result.

    It is called for runs of neighbouring rows with equal padding. So this is the most of all runs of up to `rows`
    rows of up to `tokens` tokens: fewer of both leave more multiprocessors idle.
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
    """Values of a head in the results."""
    return next((n for n in (32, 64, 96, 128, 192) if head_dim <= n), 256)


def _keys(head_dim: int) -> int:
    """Keys of a block."""
    return 256 if head_dim <= 64 else 128 if head_dim <= 128 else 64


@cache
def _splits(blocks: int, key_blocks: int, places: int) -> int:
    """Into how many parts `key_blocks` blocks of keys are divided for `blocks` blocks of queries of all heads."""
    if blocks >= _BUSY * places:
        return 1

    def used(splits: int) -> float:
        """Share of the places that work. 0 where one part fewer has parts as long."""
        if splits > 1 and -(-key_blocks // splits) == -(-key_blocks // (splits - 1)):
            return 0.0
        full = blocks * splits
        return full / (-(-full // places) * places)

    shares = [used(splits) for splits in range(1, min(_MOST_SPLITS, places, key_blocks) + 1)]
    return next(n for n, share in enumerate(shares, 1) if share >= _EFFICIENT * max(shares))
