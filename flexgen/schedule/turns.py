"""The assignment of weight slots to the visits of layers. Schedules wait by it, and slots are sized by it.

With two slots or more, the first and the last layer (the embedding and the head) have a slot each, and the layers
between them share the other slots in rotation. The head is often the largest layer, and the slowest to compute. If it
took part in the rotation, the first layers of the next token could not be loaded while it computes: the lane that
loads weights would be idle at the end of every token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Turns:
    """The slots of `layers` layers. The layers between the first and the last share `slots` slots in rotation.

    One slot serves all layers, also the first and the last, because an order without overlap must not load the head
    early. All layers share the slots as well if there are fewer layers than slots, or none between the ends.
    """

    layers: int
    slots: int

    @cached_property
    def ends_apart(self) -> bool:
        """Whether the first and the last layer have separate slots."""
        return self.slots > 1 and self.layers >= max(self.slots, 3)

    @property
    def count(self) -> int:
        """The total number of slots."""
        return self.slots + 2 * self.ends_apart

    def slot(self, token: int, layer: int) -> int:
        """The slot that serves a visit. The shared slots are numbered from 0; those of the two ends follow."""
        if self._at_end(layer):
            return self.slots + (layer > 0)
        return self._turn(token, layer) % self.slots

    def before(self, token: int, layer: int) -> tuple[int, int] | None:
        """(token, layer) of the previous visit in the same slot, or None for the first."""
        if self._at_end(layer):
            return (token - 1, layer) if token else None
        turn = self._turn(token, layer) - self.slots
        if turn < 0:
            return None
        token, place = divmod(turn, self.layers - 2 * self.ends_apart)
        return token, place + self.ends_apart

    def arrivals(self, tokens: int) -> Iterator[range]:
        """For each visit in order, the numbers of the visits whose weights may be loaded from then on.

        These are the visits whose slot has just become free. The very first visit is not among them. Only the
        first two layers of the next token are loaded early, because its ids may have to wait for the head on the same
        lane.
        """
        coming = 1
        for number in range(tokens * self.layers):
            first, following = coming, number // self.layers + 1
            end = min(following * self.layers + 2, tokens * self.layers)
            while coming < end and self._number(self.before(*divmod(coming, self.layers))) < number:
                coming += 1
            yield range(first, coming)

    def served(self, slot: int) -> list[int]:
        """All layers that a slot serves over the tokens of a run."""
        if slot >= self.slots:
            return [0 if slot == self.slots else self.layers - 1]
        first = int(self.ends_apart)
        last = self.layers - first
        # The minimum distance that a layer's slot moves from token to token.
        apart = math.gcd(last - first, self.slots)
        return [layer for layer in range(first, last) if (slot - layer + first) % apart == 0]

    def _at_end(self, layer: int) -> bool:
        return self.ends_apart and layer in (0, self.layers - 1)

    def _number(self, visit: tuple[int, int] | None) -> int:
        return visit[0] * self.layers + visit[1] if visit else -1

    def _turn(self, token: int, layer: int) -> int:
        apart = self.ends_apart
        return token * (self.layers - 2 * apart) + layer - apart
