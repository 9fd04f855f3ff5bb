"""The weights that a run has loaded for a pass that it does not compute. The next run need not load them again."""

from __future__ import annotations


class WeightsAhead:
    """The weights that have been loaded for the latest pass: of each layer in a slot, the first pieces.

    An order issues loads of the next pass while the present one computes. If the run ends with the present pass, the
    slots keep these weights.
    """

    def __init__(self) -> None:
        self._number: int | None = None
        self._loaded: dict[tuple[int, int], tuple[int, int]] = {}  # by layer and slot: pieces, of how many

    def add(self, number: int, layer: int, slot: int, piece: int, pieces: int) -> bool:
        """Add a piece of a layer for pass `number`. Returns False if its bytes were loaded before.

        The runs may divide a layer into different numbers of pieces.
        """
        if number != self._number:
            self._number, self._loaded = number, {}
        key = layer, slot
        loaded, of = self._loaded.get(key, (0, 1))
        if (piece + 1) * of <= loaded * pieces:
            return False
        if piece * of <= loaded * pieces:  # else bytes before it are missing
            self._loaded[key] = piece + 1, pieces
        return True
