"""The loads that a run need not repeat: in a table of bytes, with runs that divide layers into different pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flexgen.layout.moves import cut
from flexgen.runtime.weights_ahead import WeightsAhead

SIZE = 37


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6), st.integers(0, 2)), min_size=1, max_size=8))
def test_a_layer_is_whole_after_the_loads_of_all_its_pieces(runs: list[tuple[int, int, int]]) -> None:
    """Each run issues the first pieces of a layer for its next pass, and the next run all of them for this pass."""
    ahead, slot = WeightsAhead(), [-1] * SIZE
    for pieces, issued, number in runs:

        def load(number: int, pieces: int, some: range) -> None:
            for piece in some:
                if ahead.add(number, 3, 0, piece, pieces):
                    for part in cut([SIZE], piece, pieces, 1):
                        slot[part.begin : part.end] = [number] * (part.end - part.begin)

        load(number, pieces, range(pieces))
        assert set(slot) == {number}
        load(number + 1, pieces, range(min(issued, pieces)))


def test_only_the_latest_pass_and_the_same_slot_count() -> None:
    ahead = WeightsAhead()
    assert ahead.add(5, layer=1, slot=0, piece=0, pieces=2)
    assert not ahead.add(5, layer=1, slot=0, piece=0, pieces=2)
    assert not ahead.add(5, layer=1, slot=0, piece=1, pieces=4)
    assert ahead.add(5, layer=1, slot=0, piece=2, pieces=4)
    assert ahead.add(5, layer=1, slot=1, piece=0, pieces=2)
    assert ahead.add(5, layer=2, slot=0, piece=0, pieces=2)
    assert ahead.add(6, layer=1, slot=0, piece=0, pieces=2)
    assert ahead.add(5, layer=1, slot=0, piece=0, pieces=2)


def test_a_slot_has_one_layer() -> None:
    ahead = WeightsAhead()
    assert ahead.add(5, layer=1, slot=0, piece=0, pieces=1)
    assert ahead.add(5, layer=2, slot=0, piece=1, pieces=2), "it overwrites the end of layer 1"
    assert ahead.add(5, layer=1, slot=0, piece=0, pieces=1)
    assert not ahead.add(5, layer=1, slot=0, piece=0, pieces=1)


def test_pieces_in_another_order_are_loaded_again() -> None:
    ahead = WeightsAhead()
    assert ahead.add(0, 1, 0, piece=1, pieces=3)
    assert ahead.add(0, 1, 0, piece=1, pieces=3)
    assert ahead.add(0, 1, 0, piece=0, pieces=3)
    assert ahead.add(0, 1, 0, piece=1, pieces=3)
    assert not ahead.add(0, 1, 0, piece=1, pieces=3)
