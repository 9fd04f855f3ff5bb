"""Seats: which batches continue and which prompts enter if the cache has fewer pages than all rows may need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

_AHEAD = 16
"""Prompts enter only if the cache has the pages of all batches for this number of passes. Otherwise rows would soon
be put back, and the computation of their prompts would be lost."""

Fits = Callable[[Iterable[tuple[int, int]]], bool]
"""Whether the cache has the pages of batches with these numbers of rows and tokens."""


@dataclass(frozen=True)
class Seats:
    """The places of a block after pass `number`, for a cache whose batches grow.

    places: the maximum number of batches. lengths: the tokens of each prompt. began: the pass that computes the first
    new token of each row in the block.
    """

    places: int
    number: int
    lengths: Sequence[int]
    began: Mapping[int, int]
    fits: Fits

    def following(
        self, batches: Sequence[Sequence[int]], waiting: Sequence[Sequence[int]]
    ) -> tuple[list[list[int]], list[list[int]]]:
        """The batches of the next pass, and those that are put back to wait, for batches that continue and those that
        wait. Batches that enter come last.

        The batches with the fewest tokens are put back, until the others fit. One batch always fits. No new token is
        lost, and a batch that stays gets one in each pass, so the last row ends however long all of them are.
        """
        stay, put_back = [list(batch) for batch in batches], list[list[int]]()
        while len(stay) > 1 and not self._fit(stay, 1):
            fewest = min(range(len(stay)), key=lambda n: (len(stay[n]) * self._columns(stay[n], 0), -n))
            put_back.append(stay.pop(fewest))
        if put_back:
            return stay, put_back
        for batch in waiting[: self.places - len(stay)]:
            if stay and not self._fit([*stay, batch], _AHEAD):
                break
            stay.append(list(batch))
        return stay, put_back

    def _fit(self, batches: Sequence[Sequence[int]], passes: int) -> bool:
        return self.fits((len(rows), self._columns(rows, passes)) for rows in batches)

    def _columns(self, rows: Sequence[int], passes: int) -> int:
        """The columns of a batch some passes later. A prompt that enters gets its first new token after one."""
        following = self.number + 1
        return max(
            self.lengths[row] + max(self.number + passes - self.began.get(row, following), 0) for row in rows
        )
