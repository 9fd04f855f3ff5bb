"""Seats: batches are put back while the cache has too few pages, and prompts enter only if it has enough."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flexgen.schedule.seats import Seats


def of(room: int, number: int = 3, places: int = 4, **began: int) -> Seats:
    """A cache for `room` tokens. Prompts have 2 tokens; `began` are rows 0, 1, ... by letter."""
    rows = {"abcdefgh".index(name): at for name, at in began.items()}
    return Seats(places, number, [2] * 8, rows, lambda some: sum(n * tokens for n, tokens in some) <= room)


def test_all_stay_while_there_are_pages() -> None:
    # After pass 3, row 0 has 2 + 4 tokens, and rows 1 and 2 have 2 + 2 in the next pass.
    seats = of(6 + 2 * 4, a=0, b=2, c=2)
    assert seats.following([[0], [1, 2]], [[3]]) == ([[0], [1, 2]], [])


def test_the_batch_with_the_fewest_tokens_is_put_back() -> None:
    assert of(8 + 2 * 4 - 3, a=0, b=2, c=2).following([[0], [1, 2]], [[3]]) == ([[1, 2]], [[0]])
    assert of(13, a=0, b=0, c=3, d=3).following([[0, 1], [2], [3]], [[4]]) == ([[0, 1]], [[3], [2]])


def test_one_batch_always_stays() -> None:
    assert of(0, a=0, b=1).following([[0], [1]], []) == ([[0]], [[1]])


def test_a_prompt_enters_with_pages_for_some_passes() -> None:
    # 16 passes later, row 0 has 2 + 19 tokens and row 1, whose first new token comes one pass later, 2 + 15.
    assert of(38, a=0).following([[0]], [[1]]) == ([[0], [1]], [])
    assert of(37, a=0).following([[0]], [[1]]) == ([[0]], [])
    assert of(0).following([], [[1], [2]]) == ([[1]], []), "an empty block has room for one batch"


@given(
    began=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    waiting=st.integers(0, 4),
    places=st.integers(1, 8),
    room=st.integers(0, 99),
)
def test_no_row_is_lost(began: list[int], waiting: int, places: int, room: int) -> None:
    batches = [[row] for row in range(len(began))][:places]
    queue = [[row] for row in range(len(began), len(began) + waiting)]
    seats = Seats(places, 9, [2] * 12, dict(enumerate(began)), lambda some: sum(t for _, t in some) <= room)
    stay, put_back = seats.following(batches, queue)
    entered = [batch for batch in stay if batch in queue]
    assert sorted([*stay, *put_back]) == sorted([*batches, *entered])
    assert stay and len(stay) <= places
    assert not (put_back and entered)
    assert stay == [*(batch for batch in batches if batch not in put_back), *queue[: len(entered)]]
