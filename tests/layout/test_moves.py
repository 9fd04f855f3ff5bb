"""A long transfer is cut into pieces that cover it once."""

from hypothesis import given
from hypothesis import strategies as st

from flexgen.layout.moves import Range, cut

LENGTHS = st.lists(st.integers(0, 100_000), max_size=6)
PIECES = st.integers(1, 9)
GRAIN = st.sampled_from([1, 7, 256, 4096])


@given(lengths=LENGTHS, pieces=PIECES, grain=GRAIN)
def test_pieces_cover_every_byte_once_and_in_order(lengths, pieces, grain):
    at = [(item, 0) for item, length in enumerate(lengths) if length]
    at = dict(at)
    last_item = 0
    for piece in range(pieces):
        for item, begin, end in cut(lengths, piece, pieces, grain):
            assert item >= last_item
            assert begin == at[item] and begin < end <= lengths[item]
            at[item], last_item = end, item
    assert at == {item: length for item, length in enumerate(lengths) if length}


@given(lengths=LENGTHS, pieces=PIECES, grain=GRAIN)
def test_cuts_lie_at_multiples_of_the_grain(lengths, pieces, grain):
    for piece in range(pieces):
        for item, begin, end in cut(lengths, piece, pieces, grain):
            assert begin % grain == 0
            assert end % grain == 0 or end == lengths[item]


@given(lengths=LENGTHS, pieces=PIECES, grain=GRAIN)
def test_pieces_are_balanced_to_a_grain(lengths, pieces, grain):
    even = sum(lengths) / pieces
    for piece in range(pieces):
        size = sum(end - begin for _, begin, end in cut(lengths, piece, pieces, grain))
        assert abs(size - even) < grain + 1


def test_one_piece_is_everything():
    assert cut([10, 0, 5000], 0, 1, 4096) == [Range(0, 0, 10), Range(2, 0, 5000)]


def test_a_cut_inside_an_item():
    assert cut([8192, 8192], 0, 4, 4096) == [Range(0, 0, 4096)]
    assert cut([8192, 8192], 1, 4, 4096) == [Range(0, 4096, 8192)]
    assert cut([6000, 6000], 0, 2, 4096) == [Range(0, 0, 6000)]
    assert cut([10_000], 0, 3, 4096) == [Range(0, 0, 4096)]
    assert cut([10_000], 2, 3, 4096) == [Range(0, 8192, 10_000)]


def test_nothing_to_cut():
    assert cut([], 0, 3, 4096) == [] and cut([0, 0], 2, 3, 4096) == []
