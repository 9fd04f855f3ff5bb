"""Schedules that are put together from a few visits: the same as all of their steps numbered one by one."""

from hypothesis import assume, example, given
from hypothesis import strategies as st

from flexgen.predict.numbering import number, numbered
from flexgen.schedule.orders import ORDERS


@given(
    name=st.sampled_from(sorted(ORDERS)),
    layers=st.integers(2, 24),
    batches=st.integers(1, 5),
    pieces=st.integers(1, 4),
    tokens=st.integers(1, 9),
    slots_of=st.sampled_from(sorted(ORDERS)),
    feeds_ids=st.booleans(),
)
@example("overlap_multi_batch", 40, 1, 1, 7, "overlap_cpu_attention", False)
@example("overlap_multi_batch", 40, 1, 1, 7, "overlap_cpu_attention", True)
def test_a_schedule_from_its_sections_is_that_of_all_steps(
    name, layers, batches, pieces, tokens, slots_of, feeds_ids
):
    """With the slots of any order that has enough: a last block with fewer batches runs in another one's."""
    slots = ORDERS[slots_of].slots
    assume(slots.weights >= ORDERS[name].slots.weights and slots.cells >= ORDERS[name].slots.cells)
    grid = ORDERS[name].grid(tokens, layers, batches, pieces, slots, feeds_ids)
    short, whole = numbered(ORDERS[name], grid), number(ORDERS[name](grid), grid)
    assert list(short.steps()) == list(whole.steps())
    assert list(short.needs()) == list(whole.needs())


def test_a_deep_model_has_few_sections():
    grid = ORDERS["overlap_multi_batch"].grid(9, 200, 3, 2)
    sections = numbered(ORDERS["overlap_multi_batch"], grid).sections
    assert len(sections) == 9 * 200 and len(set(map(id, sections))) < 80
