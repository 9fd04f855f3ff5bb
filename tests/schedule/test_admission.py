"""The rule for rows that move together, with and without prompts that wait."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen.schedule.admission import (
    between,
    closed_up,
    entry_cells,
    gathered,
    joint_cells,
    regrouped,
    reseated,
)

BATCHES = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]


def stopped(*live: int) -> list[bool]:
    return [row not in live for row in range(16)]


@pytest.mark.parametrize(
    ("live", "expected"),
    [
        # Two batches have four rows: the fullest two stay, with the rows that have stopped.
        ([0, 4, 5, 6, 8, 9, 10, 12, 13, 14], [BATCHES[2], BATCHES[3], [0, 4, 5, 6]]),
        # Three batches have eight rows, but no two have four.
        ([0, 1, 4, 5, 6, 8, 9, 10, 12, 13, 14, 15], [BATCHES[3], [0, 1, 4, 5], [6, 8, 9, 10]]),
        # All four together have twelve.
        ([0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14], [[0, 1, 2, 4], [5, 6, 8, 9], [10, 12, 13, 14]]),
        # Thirteen rows need all four.
        ([0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 12, 13, 14], None),
        # A batch without rows is free, and nothing moves.
        ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], BATCHES[:3]),
    ],
)
def test_the_emptiest_batches_move_while_prompts_wait(
    live: list[int], expected: list[list[int]] | None
) -> None:
    assert regrouped(BATCHES, stopped(*live), 9, waiting=True) == expected


def test_batches_that_are_entering_do_not_move() -> None:
    live = [0, 1, 2, 3, 4, 8, 12]
    assert regrouped(BATCHES, stopped(*live), 9, [0], True) == [BATCHES[0], BATCHES[3], [4, 8]]
    assert gathered(BATCHES, stopped(*live), [0]) == [BATCHES[0], [4, 8, 12]]


def test_rows_that_have_one_token_left_do_not_move() -> None:
    assert regrouped(BATCHES, stopped(0, 4, 8, 12), 1, waiting=True) is None


PLACES = [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("ended", "computed", "waiting", "rows", "expected"),
    [
        # Two rows have ended, and a pass computes two prompts.
        ([1, 4], range(6), [6, 7, 8], 2, [[0, 6, 2], [3, 7, 5]]),
        # It computes one prompt.
        ([1, 4], range(6), [6, 7, 8], 1, [[0, 6, 2], [3, 4, 5]]),
        # Row 5 has a place already, and is computed first.
        ([1, 4], range(5), [6, 7, 8], 2, [[0, 6, 2], [3, 4, 5]]),
        ([1, 4], range(4), [6, 7, 8], 2, PLACES),
        # One prompt waits, then none: a batch whose rows have all ended has no place any more.
        ([0, 1, 2], range(6), [6], 4, [[6, 1, 2], [3, 4, 5]]),
        ([0, 1, 2], range(6), [], 4, [[], [3, 4, 5]]),
        ([0, 1, 2], range(6), [6], 0, PLACES),
        (range(6), range(6), [], 1, [[], []]),
    ],
)
def test_prompts_enter_where_rows_have_ended(
    ended: list[int], computed: list[int], waiting: list[int], rows: int, expected: list[list[int]]
) -> None:
    flags = [row in ended for row in range(9)], [row in computed for row in range(9)]
    assert reseated(PLACES, *flags, waiting, rows) == expected


@pytest.mark.parametrize(
    ("ended", "computed", "waiting", "rows", "expected"),
    [
        # The last row moves to the place of the one that has ended.
        ([1], range(6), [], 2, [[0, 5, 2], [3, 4]]),
        ([1, 4], range(6), [], 2, [[0, 5, 2], [3]]),
        ([1, 4, 5], range(6), [], 2, [[0, 3, 2], []]),
        ([5], range(6), [], 2, [[0, 1, 2], [3, 4]]),
        (range(6), range(6), [], 2, [[], []]),
        # Prompts enter in the last places, as many as a pass computes.
        ([1, 4], range(6), [6, 7, 8], 2, [[0, 5, 2], [3, 6, 7]]),
        ([1, 4], range(6), [6, 7, 8], 1, [[0, 5, 2], [3, 6]]),
        # Those that have a place already are computed first.
        ([1], range(4), [6, 7, 8], 2, [[0, 3, 2], [4, 5]]),
        ([1], range(4), [6, 7, 8], 3, [[0, 3, 2], [4, 5, 6]]),
    ],
)
def test_rows_close_up(
    ended: list[int], computed: list[int], waiting: list[int], rows: int, expected: list[list[int]]
) -> None:
    flags = [row in ended for row in range(9)], [row in computed for row in range(9)]
    assert closed_up(PLACES, (3, 3), *flags, waiting, rows) == expected


@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    ended=st.lists(st.booleans(), min_size=20, max_size=20),
    waiting=st.integers(0, 6),
    rows=st.integers(1, 5),
)
def test_rows_that_close_up_keep_their_places_if_they_can(
    sizes: list[int], ended: list[bool], waiting: int, rows: int
) -> None:
    total, places = sum(sizes), iter(range(20))
    batches = [[next(places) for _ in range(size)] for size in sizes]
    live = [row for row in range(total) if not ended[row]]
    flags = [*ended, *[False] * waiting], [row < 20 for row in range(20 + waiting)]
    after = closed_up(batches, sizes, *flags, [*range(20, 20 + waiting)], rows)
    flat = [row for batch in after for row in batch]
    entering = min(rows, waiting, total - len(live))
    assert sorted(flat) == [*live, *range(20, 20 + entering)]
    assert flat[len(live) :] == list(range(20, 20 + entering))
    assert all(flat[row] == row for row in live if row < len(live))


@pytest.mark.parametrize(
    ("computed", "rows", "together", "expected"),
    [
        (range(6), 3, 1, []),
        ([], 2, 1, [(0, range(0, 1)), (0, range(1, 2))]),
        ([], 4, 1, [(0, range(0, 1)), (0, range(1, 2)), (0, range(2, 3)), (1, range(0, 1))]),
        ([], 4, 2, [(0, range(0, 2)), (0, range(2, 3)), (1, range(0, 1))]),
        ([], 9, 8, [(0, range(3)), (1, range(3))]),
        ([1, 3, 4], 9, 8, [(0, range(0, 1)), (0, range(2, 3)), (1, range(2, 3))]),
    ],
)
def test_cells_have_adjacent_places_of_one_batch(
    computed: list[int], rows: int, together: int, expected: list[tuple[int, range]]
) -> None:
    flags = [row in computed for row in range(6)]
    assert entry_cells(PLACES, flags, rows, lambda some: len(some) <= together) == expected


@given(many=st.integers(0, 20), few=st.integers(0, 20))
def test_cells_are_spread_evenly(many: int, few: int) -> None:
    mixed = between(range(many), range(100, 100 + few))
    assert mixed[:1] == [100] or many != few or not few, "the device computes it during the first attention"
    assert [n for n in mixed if n < 100] == list(range(many))
    assert [n for n in mixed if n >= 100] == list(range(100, 100 + few))
    at = [place for place, n in enumerate(mixed) if n >= 100]
    assert all(b - a >= many // few for a, b in pairwise(at))


@given(tokens=st.lists(st.integers(1, 20), max_size=12), most=st.integers(0, 30))
def test_joint_cells_are_as_many_consecutive_ones_as_fit(tokens: list[int], most: int) -> None:
    groups = joint_cells(tokens, most)
    assert [n for group in groups for n in group] == list(range(len(tokens)))
    sizes = [sum(tokens[n] for n in group) for group in groups]
    assert all(size <= most or len(group) == 1 for size, group in zip(sizes, groups, strict=True))
    assert all(size + tokens[after.start] > most for size, after in zip(sizes, groups[1:], strict=False))
