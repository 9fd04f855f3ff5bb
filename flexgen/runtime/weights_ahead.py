"""The weights that a run has loaded for a pass that it does not compute. The next run need not load them again."""

from __future__ import annotations


class WeightsAhead:
    """The weights that have been loaded for the latest pass: in each slot, the first pieces of one layer.

    An order issues loads of the next pass while the present one computes. If the run ends with the present pass, the
    slots keep these weights.
    """

    def __init__(self) -> None:
        self._number: int | None = None
        self._loaded: dict[int, tuple[int, int, int]] = {}  # by slot: layer, pieces, of how many

    def add(self, number: int, layer: int, slot: int, piece: int, pieces: int) -> bool:
        """Add a piece of a layer for pass `number`. Returns False if its bytes were loaded before.

        The runs may divide a layer into different numbers of pieces.
        """
        if number != self._number:
            self._number, self._loaded = number, {}
        held, loaded, of = self._loaded.get(slot, (layer, 0, 1))
        if held != layer:
            loaded, of = 0, 1
        if (piece + 1) * of <= loaded * pieces:
            return False
        if piece * of <= loaded * pieces:  # else bytes before it are missing
            loaded, of = piece + 1, pieces
        self._loaded[slot] = layer, loaded, of
        return True
