"""Which rows have places in a block whose cache has fewer pages than all of its rows may need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from flexgen.layout.cache_pool import CachePool
from flexgen.schedule.seats import Seats


class Rows(Protocol):
    """The rows of a block (see `prompts.Prompts`)."""

    waiting: list[list[int]]

    @property
    def lengths(self) -> list[int]: ...

    @property
    def places(self) -> int: ...

    def began(self) -> dict[int, int]: ...

    def put_back(self, rows: Sequence[int], number: int, ids: Tensor) -> None: ...


class Seating:
    """Puts rows back to wait when the pages of `pool` are used up. `put_back`: the number of rows so far."""

    def __init__(self, pool: CachePool) -> None:
        self._pool = pool
        self.put_back = 0

    def following(
        self, prompts: Rows, batches: Sequence[list[int]], number: int, ids: Tensor, ended: Sequence[bool]
    ) -> list[list[int]]:
        """The batches after pass `number`: those of `batches` that stay, and those that enter.

        ids (rows, tokens): the new ids so far. ended: the rows that do not enter again if they are put back.
        """
        seats = Seats(prompts.places, number, prompts.lengths, prompts.began(), self._pool.fits)
        following, put_back = seats.following(batches, prompts.waiting)
        for rows in put_back:
            live = [row for row in rows if not ended[row]]
            prompts.put_back(live, number, ids)
            self.put_back += len(live)
        return following
