"""Which weight slot serves a visit of a layer: what a schedule waits for, and what the slots are sized by.

With two slots or more the first layer and the last one, the embedding and the head, have a slot each of their own,
and the layers between take turns at the others. The head is often the largest layer, and the longest to compute. If
it took its turn, the first layers of the next token could not arrive while it computes: at the end of every token the
lane that brings weights would wait.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Turns:
    """The slots of `layers` layers, of which those between the ends take turns at `slots` slots.

    One slot serves every layer: what wants no overlap must not have the head arrive early. With fewer layers than
    slots, or none between the ends, all take turns too.
    """

    layers: int
    slots: int

    @property
    def ends_apart(self) -> bool:
        """Whether the first and the last layer have slots of their own."""
        return self.slots > 1 and self.layers >= max(self.slots, 3)

    @property
    def count(self) -> int:
        """Slots in all."""
        return self.slots + 2 * self.ends_apart

    def slot(self, token: int, layer: int) -> int:
        """The slot that serves a visit: from 0 those that are taken by turns, behind them those of the ends."""
        if self._at_end(layer):
            return self.slots + (layer > 0)
        return self._turn(token, layer) % self.slots

    def before(self, token: int, layer: int) -> tuple[int, int] | None:
        """(token, layer) of the visit that had the slot last, None for the first one."""
        if self._at_end(layer):
            return (token - 1, layer) if token else None
        turn = self._turn(token, layer) - self.slots
        if turn < 0:
            return None
        token, place = divmod(turn, self.layers - 2 * self.ends_apart)
        return token, place + self.ends_apart

    def arrivals(self, tokens: int) -> Iterator[range]:
        """For each visit in order those, by number, whose weights may begin to arrive beside it and not before, the
        first visit of all excepted: those for which the visits so far have left a slot.

        Of the next token only the first two layers: on the same lane its ids may have to wait for the head.
        """
        coming = 1
        for number in range(tokens * self.layers):
            first, following = coming, number // self.layers + 1
            end = min(following * self.layers + 2, tokens * self.layers)
            while coming < end and self._number(self.before(*divmod(coming, self.layers))) < number:
                coming += 1
            yield range(first, coming)

    def served(self, slot: int) -> list[int]:
        """The layers that a slot serves, in one token or another."""
        if slot >= self.slots:
            return [0 if slot == self.slots else self.layers - 1]
        first = int(self.ends_apart)
        last = self.layers - first
        # How far a layer's slot moves from token to token, at least.
        apart = math.gcd(last - first, self.slots)
        return [layer for layer in range(first, last) if (slot - layer + first) % apart == 0]

    def _at_end(self, layer: int) -> bool:
        return self.ends_apart and layer in (0, self.layers - 1)

    def _number(self, visit: tuple[int, int] | None) -> int:
        return visit[0] * self.layers + visit[1] if visit else -1

    def _turn(self, token: int, layer: int) -> int:
        apart = self.ends_apart
        return token * (self.layers - 2 * apart) + layer - apart
