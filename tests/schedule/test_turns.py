"""The weight slots of visits: no slot is filled while it is in use, and the head delays no other layer."""

from hypothesis import given
from hypothesis import strategies as st

from flexgen.schedule.steps import Grid, Op, Visit, needed_visit
from flexgen.schedule.turns import Turns

LAYERS, SLOTS = st.integers(1, 12), st.integers(1, 4)


def visits(turns):
    return [(token, layer) for token in range(2 * turns.slots + 1) for layer in range(turns.layers)]


@given(layers=LAYERS, slots=SLOTS)
def test_the_visit_before_is_the_last_one_in_the_same_slot(layers, slots):
    turns, had = Turns(layers, slots), {}
    for visit in visits(turns):
        slot = turns.slot(*visit)
        assert 0 <= slot < turns.count
        assert turns.before(*visit) == had.get(slot)
        had[slot] = visit
    assert set(had) == set(range(turns.count)), "no slot is never used"


@given(layers=LAYERS, slots=SLOTS)
def test_visits_in_a_row_have_a_slot_each(layers, slots):
    turns = Turns(layers, slots)
    numbers = [turns.slot(*visit) for visit in visits(turns)]
    for n in range(len(numbers) - slots + 1):
        assert len(set(numbers[n : n + slots])) == slots


@given(layers=LAYERS, slots=SLOTS)
def test_a_slot_serves_the_layers_that_it_is_said_to_serve(layers, slots):
    turns = Turns(layers, slots)
    for slot in range(turns.count):
        assert set(turns.served(slot)) == {
            layer for token, layer in visits(turns) if turns.slot(token, layer) == slot
        }


@given(layers=st.integers(4, 12), slots=st.integers(2, 4))
def test_the_first_layers_of_a_token_arrive_while_the_head_computes(layers, slots):
    turns, head = Turns(layers, slots), layers - 1
    ahead = [turns.before(1, layer) for layer in range(min(slots, layers - 2) + 1)]
    assert ahead[0] == (0, 0) and (0, head) not in ahead
    assert turns.before(1, head) == (0, head)


def test_one_slot_serves_all_in_turn():
    turns = Turns(3, 1)
    assert turns.served(0) == [0, 1, 2] and turns.count == 1
    assert [turns.before(0, 2), turns.before(1, 0)] == [(0, 1), (0, 2)]


@given(layers=LAYERS, slots=SLOTS, batches=st.integers(1, 3))
def test_a_schedule_waits_for_the_layer_that_had_the_slot(layers, slots, batches):
    turns, grid = Turns(layers, slots), Grid(3, layers, batches, weight_slots=slots)
    for token, layer in visits(turns):
        (step, *_) = Visit(Op.LOAD_WEIGHTS, token, layer).steps(grid)
        before = turns.before(token, layer)
        assert needed_visit(step, grid) == (before and Visit(Op.COMPUTE, *before))
