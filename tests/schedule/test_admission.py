"""The rule for rows that move together, with and without prompts that wait."""

from __future__ import annotations

import pytest

from flexgen.schedule.admission import gathered, regrouped

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
