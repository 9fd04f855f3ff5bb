"""The passes of prompts in parts: every column once, in order, and one pass for the first token of all."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen.layout.cache import Span
from flexgen.layout.passes import LEAST_RIGHT, CellSize, Passes
from flexgen.layout.topology import SHARED
from flexgen.policy import Policy
from flexgen.schedule.admission import entry_cells
from flexgen.workload import Workload


@given(
    widths=st.lists(st.integers(1, 50), min_size=1, max_size=4),
    chunk=st.integers(0, 60),
    cached=st.integers(0, 20),
    tokens=st.integers(1, 4),
)
def test_every_column_is_computed_once(widths, chunk, cached, tokens):
    passes = Passes(max(widths), chunk, cached)
    assert passes.first == (1 - -(-max(widths) // chunk) if chunk else 0)
    assert passes.extends == (0 < chunk < max(widths))
    for width in widths:
        spans = [passes.span(token, width) for token in range(passes.first, tokens)]
        computed = [span for span in spans if span.new]
        columns = [column for span in computed for column in range(span.length, span.length + span.new)]
        assert columns == list(range(cached, cached + width + tokens - 1))
        assert max(span.new for span in computed) <= passes.new
        first_token = spans[-passes.first]
        assert first_token.new and first_token.length + first_token.new == cached + width
        # Nothing is computed before the first part, and parts are even.
        assert all(not span.new for span in spans[: len(spans) - len(computed)])
        parts = [span.new for span in computed[: len(computed) - tokens + 1]]
        assert max(parts) - min(parts) <= 1


@pytest.mark.parametrize(
    ("span", "decodes", "extends", "pages"),
    [
        (Span(0, 1), False, False, (0, 0)),
        (Span(0, 9), False, False, (0, 2)),
        (Span(3, 1), True, False, (0, 1)),
        (Span(4, 1), True, False, (1, 1)),
        (Span(5, 7), False, True, (1, 3)),
        (Span(5, 0), False, False, (1, 1)),
    ],
)
def test_kinds_of_steps(span, decodes, extends, pages):
    assert (span.decodes, span.extends, span.pages(4)) == (decodes, extends, pages)


@pytest.mark.parametrize(
    ("passes", "rows", "sizes"),
    [
        (Passes(512), 48, [(48, 512)]),
        (Passes(512, 128), 48, [(48, 128)]),
        (Passes(2, guess=4), 48, [(48, 5)]),
        (Passes(512, rows=6, batches=8), 48, [(48, 1), (1, 512)]),
        (Passes(512, rows=6, batches=4), 48, [(48, 1), (2, 512)]),
        (Passes(512, rows=6, batches=1), 4, [(4, 1), (4, 512)]),
        (Passes(64, rows=6, batches=8), 48, [(48, 1), (4, 64)]),
        (Passes(8, rows=6, batches=8), 48, [(48, 1), (6, 8)]),
        # Rows that close up: about 256 tokens.
        (Passes(512, rows=48, closes_up=True), 48, [(48, 1), (1, 512)]),
        (Passes(64, rows=48, closes_up=True), 48, [(48, 1), (4, 64)]),
    ],
)
def test_the_sizes_of_cells(passes, rows, sizes):
    assert passes.cells(rows) == tuple(CellSize(*size) for size in sizes)
    assert passes.positions(rows) == max(rows * new for rows, new in sizes)


@given(
    computed=st.lists(st.booleans(), min_size=1, max_size=40),
    width=st.integers(1, 600),
    limit=st.integers(1, 12),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 6)),
)
def test_no_cell_of_prompts_is_larger(computed, width, limit, shape):
    """Also in a block with fewer or smaller batches than the largest one."""
    size, batches = shape
    passes = Passes(width, rows=limit, batches=batches)
    seated = [list(range(len(computed)))[n : n + size] for n in range(0, len(computed), size)][:batches]
    cells = entry_cells(seated, computed, passes.rows, lambda some: passes.together([width] * len(some)))
    prompts = passes.cells(size)[1]
    assert all(len(places) <= prompts.rows for _, places in cells)
    assert sum(len(places) for _, places in cells) <= limit


def test_short_prompts_that_enter_in_adjacent_places_form_larger_cells():
    passes = Passes(128, rows=48, closes_up=True)
    assert passes.together([128, 100]) and not passes.together([128, 100, 90])
    assert passes.together([20] * 12) and not passes.together([20] * 13)
    # Buffers have room for one prompt of this length.
    long = Passes(150, rows=8, closes_up=True)
    assert long.together([150]) and long.together([30] * 5) and not long.together([30] * 6)


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=12), rows=st.integers(1, 12))
def test_buffers_have_room_for_every_cell_of_prompts(lengths, rows):
    passes = Passes(max(lengths), rows=rows, closes_up=True)
    batch = list(range(len(lengths)))
    cells = entry_cells(
        [batch], [False] * len(lengths), rows, lambda some: passes.together([lengths[n] for n in some])
    )
    for _, places in cells:
        computed = len(places) * max(lengths[n] for n in places)
        assert computed <= passes.positions(len(lengths))


def test_passes_have_guesses_where_enough_of_them_are_right():
    policy = Policy(gpu_batch_size=4, guess=4)
    for copied, guess in ((1, 0), (1 + LEAST_RIGHT / 2, 0), (1 + LEAST_RIGHT, 4), (3, 4)):
        assert Passes.expected(Workload(16, 4, 4, copied=copied), policy) == Passes(16, guess=guess)
    assert Passes.of(Workload(16, 4, 4), policy).guess == 4, "memory for them is needed in any case"


def test_when_prompts_enter_in_cells_of_their_own():
    policy = Policy(gpu_batch_size=4, num_gpu_batches=3, prefill_rows=5)
    assert Passes.of(Workload(16, 4, 12), policy) == Passes(16, rows=5, batches=3)
    assert Passes.of(Workload(16, 1, 12), policy).rows == 0, "no row decodes"
    assert Passes.of(Workload(16, 4, 12), policy, SHARED) == Passes(16, rows=5, batches=3, closes_up=True)
    split = policy.replace(cache={"gpu": 50, "cpu": 50})
    assert not Passes.of(Workload(16, 4, 12), split, SHARED).closes_up
    assert Passes.of(Workload(16, 4, 12), policy.replace(prefill_chunk=8)).rows == 0
    assert Passes.of(Workload(16, 4, 12), policy.replace(prefill_chunk=16)).rows == 5
