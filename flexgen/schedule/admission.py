"""Admission: which rows share a batch after a pass, and when prompts that wait enter."""

from __future__ import annotations

from collections.abc import Collection, Sequence

_PAID_BACK = 2
"""The number of tokens after which compaction pays off. It reads and writes the cache of the remaining rows once.
With at most half of the rows left, each later token reads at least the same number of bytes less."""


_GIVE = 4
"""While prompts wait, at most this number of batches, k, move to free one of them. Then at least 1 - 1/k of the
places of these batches are in use, and each prompt that enters moves at most k - 1 rows. The seconds lost to idle
places and to copies are fewest if k is the square root of a ratio: the seconds of a prompt's passes (mean answer *
seconds of a pass / places) to those that copy the cache of a row. They change slowly around that."""


def regrouped(
    batches: Sequence[Sequence[int]],
    stopped: Sequence[bool],
    tokens_left: int,
    entering: Collection[int] = (),
    waiting: bool = False,
) -> list[list[int]] | None:
    """The rows of each batch for later tokens: [] if every row has stopped, None to continue without a change.

    batches: the numbers of the rows of each batch. stopped: indexed by these numbers. entering: the numbers of the
    batches whose prompts are not computed yet; they stay as they are. waiting: whether prompts wait for a free batch.

    If at most half of the computed rows still generate, they move together into full batches. So each compaction
    moves at most half the rows of the one before, and all of them together cost at most one move of the whole block.
    The size of the batches stays the same, so that weights are used for many rows. A batch without a row that still
    generates is always dropped, because that moves nothing. If prompts wait, the rows of the emptiest batches move as
    soon as this frees a batch.
    """
    live = [[row for row in batch if not stopped[row]] for batch in batches]
    count = sum(map(len, live))
    if count and tokens_left >= _PAID_BACK:
        if waiting:
            if kept := _freed(batches, live, entering):
                return kept
        elif 2 * count <= sum(map(len, batches)):
            return gathered(batches, stopped, entering)
    if all(live):
        return None
    return [list(batch) for batch, going in zip(batches, live, strict=True) if going]


def unmoved(
    batches: Sequence[Sequence[int]], stopped: Sequence[bool], entering: Collection[int] = ()
) -> list[list[int]] | None:
    """`regrouped` for rows that must stay in their batches: the batches with a row that still generates."""
    kept = [
        list(batch)
        for k, batch in enumerate(batches)
        if k in entering or not all(stopped[row] for row in batch)
    ]
    return None if len(kept) == len(batches) else kept


def gathered(
    batches: Sequence[Sequence[int]], stopped: Sequence[bool], entering: Collection[int] = ()
) -> list[list[int]]:
    """The rows that still generate, in full batches, and the batches that are entering."""
    rows = [row for k, batch in enumerate(batches) if k not in entering for row in batch if not stopped[row]]
    return [*(list(batches[k]) for k in entering), *_full(rows, batches)]


def _full(rows: Sequence[int], batches: Sequence[Sequence[int]]) -> list[list[int]]:
    size = max(map(len, batches))
    return [list(rows[n : n + size]) for n in range(0, len(rows), size)]


def _freed(
    batches: Sequence[Sequence[int]], live: Sequence[Sequence[int]], entering: Collection[int]
) -> list[list[int]] | None:
    """The batches with one less: the rows of the emptiest ones together. None if they are too full for that."""
    emptiest = sorted(
        (k for k, rows in enumerate(live) if rows and k not in entering), key=lambda k: len(live[k])
    )
    for count in range(2, min(len(emptiest), _GIVE) + 1):
        together = sorted(emptiest[:count])
        moved = _full([row for k in together for row in live[k]], batches)
        if len(moved) < count:
            stay = (k for k, rows in enumerate(live) if rows and k not in together)
            return [*(list(batches[k]) for k in stay), *moved]
    return None
