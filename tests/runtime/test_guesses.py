"""Guesses from earlier text, and which of them a pass keeps."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexgen.layout.cache import Span
from flexgen.runtime.cell import BoundCell, Padding
from flexgen.runtime.guesses import Guesses, Propose, copied


@dataclass(eq=False)
class Batch:
    rows: tuple[int, ...]
    width: int


@pytest.mark.parametrize(
    ("ids", "count", "guesses"),
    [
        ([1, 2, 3, 4, 5, 1, 2, 3], 2, [4, 5]),
        ([1, 2, 3, 4, 5, 1, 2, 3], 8, [4, 5, 1, 2, 3]),  # no further than the text
        ([1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3], 1, [5]),  # the latest occurrence
        ([7, 7, 7, 7], 3, [7]),  # occurrences may overlap
        ([1, 2, 9, 4, 1, 2, 3], 2, []),
        ([1, 2, 3], 2, []),  # the only occurrence is the end itself
        ([1, 2], 2, []),
        ([], 2, []),
    ],
)
def test_copied(ids: list[int], count: int, guesses: list[int]) -> None:
    assert list(copied(np.array(ids, dtype=np.int64), count)) == guesses


@given(ids=st.lists(st.integers(0, 2), max_size=40), count=st.integers(1, 9))
def test_copied_is_what_a_plain_search_finds(ids: list[int], count: int) -> None:
    last, expected = tuple(ids[-3:]), []
    for begin in range(len(ids) - 4, -1, -1):
        if tuple(ids[begin : begin + 3]) == last:
            expected = ids[begin + 3 : begin + 3 + count]
            break
    assert list(copied(np.array(ids, dtype=np.int64), count)) == expected


def test_rows_advance_by_the_guesses_that_are_right() -> None:
    prompts = [np.array([1, 2, 3]), np.array([4, 5])]
    guesses = Guesses(prompts, 10, 3, lambda ids, count: [8, 9, 7][:count])
    batch = Batch((0, 1), 3)
    guesses.start(batch, [6, 6], ended=())
    now = guesses.bind(batch, 1)
    assert now.span == Span(3, 4, guessed=3), "columns of the prompt, and all guesses"
    assert now.computed.tolist() == [[6, 8, 9, 7]] * 2
    assert now.lengths.tolist() == [3, 3] and now.first == [1, 1]
    first, got = guesses.accepted(batch, 1, [[8, 9, 5, 0], [3, 9, 7, 0]])
    assert first == [1, 1]
    assert got == [[8, 9, 5], [3]], "two guesses of row 0 are right, none of row 1"
    guesses.advance(batch, 1, got, ended=())
    now = guesses.bind(batch, 2)
    assert now.lengths.tolist() == [6, 4] and now.first == [4, 2]
    assert now.computed.tolist() == [[5, 8, 9, 7], [3, 8, 9, 7]]
    assert now.span == Span(6, 4, guessed=3)
    assert (guesses.made, guesses.kept) == (6, 2)


def test_rows_that_get_no_token_attend_to_their_first_columns_only() -> None:
    """Row 0 has ended, and the prompt of row 2 is not computed yet; attention does not read their caches."""
    prompts = [np.array([1, 2, 3]), np.array([4, 5]), np.array([6])]
    guesses = Guesses(prompts, 10, 0)
    batch, starts = Batch((0, 1), 3), torch.tensor([0, 1, 2])
    guesses.start(batch, [6, 6], ended={0})
    assert guesses.bind(batch, 1).idle.tolist() == [True, False]
    seated = Batch((0, 1, 2), 3)
    guesses.seat(seated, 1)
    now = guesses.bind(seated, 1)
    assert now.idle.tolist() == [True, False, True]
    assert now.lengths.tolist() == [3, 3, 12], "the new columns"
    cell = BoundCell(1, 1, 0, 0, now.span, Padding((0, 1, 2), starts, starts), guesses=now)
    assert cell.contexts(range(3)).tolist() == [0, 3, 2]
    assert cell.contexts(range(1, 3)).tolist() == [3, 2]


def test_the_columns_of_a_pass_whose_rows_are_not_known_yet() -> None:
    guesses = Guesses([np.array([1, 2])], 20, 4, lambda ids, count: [1] * count)
    batch = Batch((0,), 2)
    guesses.start(batch, [5], ended=())
    assert guesses.bind(batch, 1).span == Span(2, 5, guessed=4)
    assert guesses.bind(batch, 2).span == Span(2 + 5, 5, guessed=4), "if all guesses of pass 1 are right"
    assert guesses.bind(batch, 9).span.length == 2 + 20 - 1, "never more than all tokens"


def test_a_batch_without_guesses_computes_one_token() -> None:
    found = [[], [7]]
    guesses = Guesses([np.array([1, 2])], 20, 4, lambda ids, count: found[len(ids) > 3])
    batch = Batch((0,), 2)
    guesses.start(batch, [5], ended=())
    now = guesses.bind(batch, 1)
    assert now.span == Span(2, 1) and now.span.decodes
    assert now.computed.tolist() == [[5]] and now.drawn.shape == (1, 1)
    guesses.advance(batch, 1, guesses.accepted(batch, 1, [[6]])[1], ended=())
    now = guesses.bind(batch, 2)
    assert now.span == Span(3, 5, guessed=4) and now.span.decodes and not now.span.extends
    assert now.computed.tolist() == [[6, 7, 6, 6, 6]] and now.guessed == [1]


def test_a_pass_that_begins_before_its_ids_are_known_is_as_wide_as_the_one_before() -> None:
    guesses, batch = Guesses([np.array([1, 2])], 20, 4, lambda ids, count: [1] * count), Batch((0,), 2)
    assert guesses.bind(batch, 1).span == Span(2, 1), "without any guess so far"
    guesses.start(batch, [5], ended=())
    assert guesses.bind(batch, 1).computed.tolist() == [[5]]
    assert guesses.bind(batch, 2).span == Span(2 + 5, 5, guessed=4)


def run_alone(text: list[int], prompt: int, propose: Propose) -> tuple[Guesses, list[int]]:
    """Compute `text` after its first ids, with guesses. Returns the new tokens of each pass."""
    guesses, batch = Guesses([np.array(text[:prompt])], len(text) - prompt, 4, propose), Batch((0,), prompt)
    guesses.start(batch, [text[prompt]], ended=())
    counts, token, done = [], 1, prompt + 1
    while done < len(text):
        now = guesses.bind(batch, token)
        assert now.lengths.tolist() == [done - 1]
        drawn = [[*text[done:], 0, 0, 0, 0][: now.span.new]]
        got = guesses.accepted(batch, token, drawn)[1]
        counts.append(len(got[0]))
        done += len(got[0])
        guesses.advance(batch, token, got, ended=())
        token += 1
    return guesses, counts


def test_guesses_that_are_wrong_again_and_again_are_no_longer_computed() -> None:
    """And they are computed again when guesses that no pass has computed would have been right."""
    text = list(range(100, 160))
    guesses, counts = run_alone(text, 2, lambda ids, count: [0] * count)
    assert counts == [1] * 57
    assert 0 < guesses.made <= 4 * 8, "a few passes"

    def propose(ids: np.ndarray, count: int) -> list[int]:
        return [0] * count if len(ids) < 30 else text[len(ids) : len(ids) + count]

    guesses, counts = run_alone(text, 2, propose)
    assert counts[:27] == [1] * 27, "up to token 30, all guesses are wrong"
    assert sum(count == 5 for count in counts) >= 5, "then most are kept"


def test_a_few_right_guesses_do_not_widen_the_pass_of_many_rows() -> None:
    """Row 0 of many has a guess that is right half of the time: less than a tenth of a token per row."""
    for rows, computed in ((4, True), (40, False)):
        guesses = Guesses(
            [np.array([n]) for n in range(rows)], 20, 1, lambda ids, count: [9] * count if not ids[0] else []
        )
        batch = Batch(tuple(range(rows)), 1)
        guesses.start(batch, [5] * rows, ended=())
        assert bool(guesses.bind(batch, 1).span.guessed) == computed
        assert guesses.bind(batch, 1).guessed[0] == 1


def test_rows_of_different_batches_continue_together() -> None:
    prompts = [np.array([1, 2, 3]), np.array([4, 5]), np.array([6])]
    guesses = Guesses(prompts, 10, 2, lambda ids, count: [8, 9][:count])
    first, second = Batch((0, 1), 3), Batch((2,), 1)
    guesses.start(first, [6, 6], ended=())
    guesses.start(second, [7], ended=())
    guesses.advance(first, 1, [[8, 9, 5], [3]], ended=())
    guesses.advance(second, 1, [[8, 1]], ended=())
    together = Batch((2, 0), 3)
    assert guesses.move(together, 2) == 3 + 4 - 1, (
        "row 0 has a prompt of 3 and 4 new tokens, the last not cached"
    )
    now = guesses.bind(together, 2)
    assert now.lengths.tolist() == [3 + 3 - 1, 3 + 4 - 1]
    assert now.first == [3, 4] and now.newest.tolist() == [[1], [5]]
    assert now.computed.tolist() == [[1, 8, 9], [5, 8, 9]]
    assert [guesses.new(row) for row in range(3)] == [4, 2, 3]


def test_a_batch_that_has_ended_is_freed() -> None:
    guesses, batch = Guesses([np.array([1])], 4, 2), Batch((0,), 1)
    guesses.start(batch, [5], ended=())
    guesses.bind(batch, 1)
    gone = weakref.ref(batch)
    del batch
    assert gone() is None


def test_no_guess_is_beyond_the_last_token_or_for_a_row_that_has_ended() -> None:
    guesses = Guesses([np.array([1]), np.array([2])], 3, 8, lambda ids, count: [9] * count)
    batch = Batch((0, 1), 1)
    guesses.start(batch, [5, 5], ended={1})
    now = guesses.bind(batch, 1)
    assert now.guessed == [1, 0], "token 1 is a guess; token 2 follows from it"
    guesses.advance(batch, 1, [[9, 4], []], ended={0, 1})
    assert guesses.bind(batch, 2).guessed == [0, 0]
    assert guesses.bind(batch, 2).lengths.tolist() == [3, 1], "rows that have ended stay"
