"""Admission: which rows share a batch after a pass, and when prompts that wait enter."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import accumulate, islice
from typing import TypeVar

_T = TypeVar("_T")

Place = tuple[int, int]
"""The number of a batch, and the number of a place in this batch."""

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


def reseated(
    batches: Sequence[Sequence[int]],
    ended: Sequence[bool],
    computed: Sequence[int],
    waiting: Sequence[int],
    rows: int,
) -> list[list[int]]:
    """The row in each place of each batch for the next pass, if prompts enter in the places of rows that have ended.

    A batch whose rows have all ended is [] if no prompt waits.

    ended: by row, whether it has ended.
    computed: by row, 0 until its prompt was computed. Such rows in `batches` are computed next.
    waiting: the rows without a place.
    rows: the maximum number of prompts that a pass computes.
    """
    room = rows - sum(not computed[row] for batch in batches for row in batch)
    entering = iter(waiting[: max(room, 0)])
    seated = [[next(entering, row) if ended[row] else row for row in batch] for batch in batches]
    if room >= len(waiting):
        seated = [[] if all(ended[row] for row in batch) else batch for batch in seated]
    return seated


def closed_up(
    batches: Sequence[Sequence[int]],
    sizes: Sequence[int],
    ended: Sequence[bool],
    computed: Sequence[int],
    waiting: Sequence[int],
    rows: int,
) -> list[list[int]]:
    """As `reseated`, for a block whose rows move to its first places when others have ended (`Topology.closes_up`).

    As few rows as possible move: the last ones, to the places of rows that have ended. Prompts that are not computed
    yet have the places after all other rows. The result has only places with a row.

    sizes: the number of places of each batch.
    """
    begins = [*accumulate(sizes, initial=0)]
    going = {
        begins[k] + n: row for row, (k, n) in _places(batches).items() if computed[row] and not ended[row]
    }
    moving = (row for place, row in going.items() if place >= len(going))
    seated = [going[place] if place in going else next(moving) for place in range(len(going))]
    seated += (row for batch in batches for row in batch if not computed[row])
    room = min(len(going) + rows, sum(sizes)) - len(seated)
    following = iter([*seated, *waiting[: max(room, 0)]])
    return [list(islice(following, size)) for size in sizes]


def movers(
    before: Sequence[Sequence[int]], after: Sequence[Sequence[int]], computed: Sequence[int]
) -> dict[int, tuple[Place, Place]]:
    """The old and the new place of each row that moves with its cache, by row. computed: as for `reseated`."""
    old, new = _places(before), _places(after)
    return {row: (old[row], place) for row, place in new.items() if computed[row] and old[row] != place}


def _places(batches: Sequence[Sequence[int]]) -> dict[int, Place]:
    """The place of each row."""
    return {row: (k, n) for k, batch in enumerate(batches) for n, row in enumerate(batch)}


def entry_cells(
    batches: Sequence[Sequence[int]],
    computed: Sequence[int],
    rows: int,
    together: Callable[[Sequence[int]], bool],
) -> list[tuple[int, range]]:
    """The cells in which the next pass computes prompts: for each, the batch and adjacent places in it.

    computed, rows: as for `reseated`. together: whether these rows may form a cell.
    """
    cells: list[tuple[int, range]] = []
    places = ((k, n) for k, batch in enumerate(batches) for n, row in enumerate(batch) if not computed[row])
    for k, n in islice(places, rows):
        batch, before = cells[-1] if cells else (k, range(0))
        if cells and (batch, before.stop) == (k, n) and together(batches[k][before.start : n + 1]):
            cells[-1] = k, range(before.start, n + 1)
        else:
            cells.append((k, range(n, n + 1)))
    return cells


def between(decoding: Sequence[_T], entering: Sequence[_T]) -> list[_T]:
    """The cells of a pass in the order in which they run: those of each kind in order and evenly spread.

    If there are as many of both kinds, a cell in which prompts enter is first. The device computes it while the host
    computes the first attention of the pass.
    """
    cells = [
        ((n + 0.5) / len(some), first, n, cell)
        for first, some in enumerate((entering, decoding))
        for n, cell in enumerate(some)
    ]
    return [cell for *_, cell in sorted(cells, key=lambda cell: cell[:3])]


def joint_cells(tokens: Sequence[int], most: int) -> list[range]:
    """The cells of a layer that one call computes: consecutive ones with at most `most` tokens, or a larger cell.

    tokens: the number of tokens of each cell.
    """
    groups: list[range] = []
    count = 0
    for n, own in enumerate(tokens):
        count += own
        if groups and count <= most:
            groups[-1] = range(groups[-1].start, n + 1)
        else:
            groups.append(range(n, n + 1))
            count = own
    return groups
