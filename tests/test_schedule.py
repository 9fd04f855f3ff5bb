"""Orders are legal and complete, and `check` finds every kind of order that is not."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen.errors import ScheduleError
from flexgen.schedule import ORDERS, Cell, Grid, Op, Slots, Step, all_steps, check, needs, order, order_for

SHIPPED = ["normal", "overlap_single_batch", "overlap_multi_batch", "overlap_cpu_attention", "flexgen"]
OVERLAP = SHIPPED[1:4]

grids = st.builds(
    Grid,
    tokens=st.integers(1, 5),
    layers=st.integers(1, 5),
    batches=st.integers(1, 5),
    weight_pieces=st.integers(1, 7),
    weight_slots=st.integers(2, 5),
    cell_slots=st.integers(2, 5),
    splits_attention=st.booleans(),
)


def W(i, j, piece=0):
    return Step(Op.LOAD_WEIGHTS, i, j, piece)


def test_the_orders_are_registered():
    assert set(SHIPPED) <= set(ORDERS)


@pytest.mark.parametrize("name", SHIPPED)
def test_orders_are_legal_on_every_small_grid(name):
    shapes = itertools.product((1, 3), (1, 2, 3), (1, 2, 3, 4, 5))
    for shape, *slots in itertools.product(shapes, (1, 2, 5), (2, 3), (2, 3, 4), (False, True)):
        grid = Grid(*shape, *slots)
        check(ORDERS[name](grid), grid)


@given(grid=grids, name=st.sampled_from(SHIPPED))
def test_orders_are_legal_on_any_grid(grid, name):
    check(ORDERS[name](grid), grid)


@pytest.mark.parametrize(
    ("name", "slots", "splits"),
    [
        ("normal", Slots(1, 1), False),
        ("overlap_single_batch", Slots(2, 2), False),
        ("overlap_multi_batch", Slots(2, 2), False),
        ("overlap_cpu_attention", Slots(3, 4, decoded=2), True),
        ("flexgen", Slots(1, 2), False),
    ],
)
def test_orders_are_legal_with_the_slots_they_ask_for(name, slots, splits):
    asked = ORDERS[name]
    assert (asked.slots, asked.splits_attention) == (slots, splits)
    for *shape, pieces in itertools.product((1, 2, 3), (1, 2, 3), (1, 2, 3, 4, 5, 8), (1, 2, 3)):
        grid = asked.grid(*shape, pieces)
        assert (grid.weight_slots, grid.cell_slots, grid.splits_attention) == (
            slots.weights,
            slots.cells,
            splits,
        )
        check(asked(grid), grid)


@given(grid=grids)
def test_all_steps_names_each_once(grid):
    steps = list(all_steps(grid))
    visits, cells = grid.tokens * grid.layers, grid.tokens * grid.layers * grid.batches
    assert (
        len(steps)
        == len(set(steps))
        == visits * grid.weight_pieces + cells * (8 if grid.splits_attention else 5)
    )


@given(grid=grids, name=st.sampled_from(SHIPPED), data=st.data())
def test_a_dropped_step_is_found(grid, name, data):
    steps = list(ORDERS[name](grid))
    dropped = steps.pop(data.draw(st.integers(0, len(steps) - 1)))
    with pytest.raises(ScheduleError) as caught:
        check(steps, grid)
    assert str(dropped) in str(caught.value)


@given(grid=grids, name=st.sampled_from(SHIPPED), data=st.data())
def test_two_dependent_steps_in_the_wrong_order_are_found(grid, name, data):
    steps = list(ORDERS[name](grid))
    later = data.draw(st.sampled_from([step for step in steps if needs(step, grid)]))
    earlier = data.draw(st.sampled_from(needs(later, grid)))
    a, b = steps.index(earlier), steps.index(later)
    steps[a], steps[b] = steps[b], steps[a]
    with pytest.raises(ScheduleError, match="is issued before") as caught:
        check(steps, grid)
    assert f"step {a} {later} is issued before" in str(caught.value)


@given(grid=grids, name=st.sampled_from(SHIPPED), data=st.data())
def test_a_repeated_step_is_found(grid, name, data):
    steps = list(ORDERS[name](grid))
    again = data.draw(st.sampled_from(steps))
    steps.insert(data.draw(st.integers(steps.index(again) + 1, len(steps))), again)
    with pytest.raises(ScheduleError, match="is issued twice") as caught:
        check(steps, grid)
    assert str(again) in str(caught.value)


@pytest.mark.parametrize(
    "outside",
    [
        Step(Op.COMPUTE, 2, 0, 0),
        Step(Op.COMPUTE, 0, 3, 0),
        Step(Op.COMPUTE, 0, 0, 4),
        Step(Op.COMPUTE, -1, 0, 0),
        W(0, 0, 5),
    ],
)
def test_a_step_outside_the_grid_is_found(outside):
    grid = Grid(tokens=2, layers=3, batches=4, weight_pieces=5)
    with pytest.raises(ScheduleError, match="is outside") as caught:
        check([*ORDERS["normal"](grid), outside], grid)
    assert str(outside) in str(caught.value)


def test_nothing_is_no_complete_order():
    grid = Grid(1, 1, 1)
    with pytest.raises(ScheduleError, match="6 steps are never issued"):
        check([], grid)


@pytest.mark.parametrize("name", OVERLAP)
@pytest.mark.parametrize(
    "slots", [dict(weight_slots=1), dict(cell_slots=1), dict(weight_slots=1, cell_slots=1)]
)
@pytest.mark.parametrize("batches", [1, 2, 3])
def test_overlap_needs_a_second_slot(name, slots, batches):
    grid = Grid(tokens=2, layers=3, batches=batches, splits_attention=ORDERS[name].splits_attention, **slots)
    with pytest.raises(ScheduleError, match="is issued before"):
        check(ORDERS[name](grid), grid)
    check(ORDERS["normal"](grid), grid)


@pytest.mark.parametrize("field", [f for f in Grid.__dataclass_fields__ if f != "splits_attention"])
def test_a_grid_has_at_least_one_of_everything(field):
    sizes = dict(tokens=1, layers=1, batches=1) | {field: 0}
    with pytest.raises(ScheduleError, match=f"{field} >= 1, not 0"):
        Grid(**sizes)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        # The first token: nothing is cached, nothing comes from a layer before, every slot is free.
        (W(0, 0, 1), []),
        (Step(Op.LOAD_CACHE, 0, 0, 0), []),
        (Step(Op.LOAD_HIDDEN, 0, 0, 0), []),
        (Step(Op.COMPUTE, 0, 0, 0), [W(0, 0, 0), W(0, 0, 1), (Op.LOAD_CACHE, 0, 0, 0), (Op.LOAD_HIDDEN, 0, 0, 0)]),
        # Weights take the slot of two visits before, once both batches of that visit are computed.
        (W(0, 1), []),
        (W(0, 2), [(Op.COMPUTE, 0, 0, 0), (Op.COMPUTE, 0, 0, 1)]),
        (W(1, 1), [(Op.COMPUTE, 0, 2, 0), (Op.COMPUTE, 0, 2, 1)]),
        # Hidden states come from the layer before; ids of a later token from the head of the one before.
        (Step(Op.LOAD_HIDDEN, 0, 1, 0), [(Op.STORE_HIDDEN, 0, 0, 0), (Op.COMPUTE, 0, 0, 0)]),
        (Step(Op.LOAD_HIDDEN, 1, 0, 1), [(Op.STORE_HIDDEN, 0, 2, 1), (Op.COMPUTE, 0, 2, 1)]),
        # Cache of a later token is what the one before stored; its slot is that of two cells before.
        (
            Step(Op.LOAD_CACHE, 1, 1, 0),
            [(Op.STORE_CACHE, 0, 1, 0), (Op.COMPUTE, 1, 0, 0), (Op.STORE_CACHE, 1, 0, 0)],
        ),
        # The output buffers of two cells before must have been stored.
        (
            Step(Op.COMPUTE, 1, 2, 1),
            [
                *(W(1, 2, 0), W(1, 2, 1), (Op.LOAD_CACHE, 1, 2, 1), (Op.LOAD_HIDDEN, 1, 2, 1)),
                *((Op.STORE_HIDDEN, 1, 1, 1), (Op.STORE_CACHE, 1, 1, 1)),
            ],
        ),
        (Step(Op.STORE_HIDDEN, 1, 2, 1), [(Op.COMPUTE, 1, 2, 1)]),
        (Step(Op.STORE_CACHE, 0, 0, 0), [(Op.COMPUTE, 0, 0, 0)]),
    ],
)  # fmt: skip
def test_needs_of_hand_written_cases(step, expected):
    grid = Grid(tokens=2, layers=3, batches=2, weight_pieces=2)
    assert sorted(needs(step, grid), key=str) == sorted((Step(*s) for s in expected), key=str)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        # The host is asked as soon as the device has the cell's input, and needs its cache only to answer.
        (Step(Op.PROJECT, 0, 0, 0), [W(0, 0, 0), W(0, 0, 1), (Op.LOAD_HIDDEN, 0, 0, 0)]),
        (Step(Op.ATTEND, 1, 1, 0), [(Op.PROJECT, 1, 1, 0), (Op.LOAD_CACHE, 1, 1, 0)]),
        (Step(Op.LOAD_ATTENDED, 1, 1, 0), [(Op.ATTEND, 1, 1, 0)]),
        # What it is asked and answers lies in the slot of three cells before, which has been computed.
        (
            Step(Op.PROJECT, 1, 2, 1),
            [W(1, 2, 0), W(1, 2, 1), (Op.LOAD_HIDDEN, 1, 2, 1), (Op.COMPUTE, 1, 1, 0)],
        ),
        (
            Step(Op.COMPUTE, 1, 2, 1),
            [(Op.LOAD_ATTENDED, 1, 2, 1), (Op.STORE_HIDDEN, 1, 1, 0), (Op.STORE_CACHE, 1, 1, 0)],
        ),
    ],
)
def test_needs_of_the_halves_of_a_cell(step, expected):
    grid = Grid(tokens=2, layers=3, batches=2, weight_pieces=2, cell_slots=3, splits_attention=True)
    assert sorted(needs(step, grid), key=str) == sorted((Step(*s) for s in expected), key=str)


def test_needs_with_other_numbers_of_slots():
    grid = Grid(tokens=2, layers=2, batches=2, weight_slots=1, cell_slots=3)
    assert needs(W(0, 1), grid) == [Step(Op.COMPUTE, 0, 0, 0), Step(Op.COMPUTE, 0, 0, 1)]
    assert needs(Step(Op.LOAD_HIDDEN, 0, 1, 1), grid) == [
        Step(Op.STORE_HIDDEN, 0, 0, 1),
        Step(Op.COMPUTE, 0, 0, 0),
    ]


@given(grid=grids)
def test_steps_that_share_a_slot_never_meet(grid):
    """The user of a slot before this one is among what the new user needs."""
    last: dict[int, Cell] = {}
    for cell in grid.cells():
        slot = grid.cell_slot(*cell)
        if slot in last:
            assert Step(Op.COMPUTE, *last[slot]) in needs(Step(Op.LOAD_HIDDEN, *cell), grid)
            assert Step(Op.STORE_CACHE, *last[slot]) in needs(Step(Op.LOAD_CACHE, *cell), grid)
            assert Step(Op.STORE_HIDDEN, *last[slot]) in needs(Step(Op.COMPUTE, *cell), grid)
            assert Step(Op.COMPUTE, *last[slot]) in needs(Step(Op.PROJECT, *cell), grid)
        last[slot] = cell


@given(grid=grids)
def test_cells_and_visits_walk_the_grid(grid):
    cells = list(grid.cells())
    for n, cell in enumerate(cells):
        assert grid.cell_after(cell, 1) == (cells[n + 1] if n + 1 < len(cells) else None)
        assert grid.cell_after(cell, -2) == (cells[n - 2] if n >= 2 else None)
    visits = [cell[:2] for cell in cells if cell.batch == 0]
    for n, visit in enumerate(visits):
        assert grid.visit(*visit, 1) == (visits[n + 1] if n + 1 < len(visits) else None)


@given(grid=grids)
def test_pieces_are_spread_over_the_batches_earliest_first(grid):
    beside = [grid.pieces_beside(batch) for batch in range(grid.batches)]
    assert list(itertools.chain(*beside)) == list(range(grid.weight_pieces))
    assert max(map(len, beside)) - min(map(len, beside)) <= 1
    for batch, pieces in enumerate(beside):  # never later than an even spread
        assert pieces.stop * grid.batches >= (batch + 1) * grid.weight_pieces


def test_a_custom_order_is_a_generator_and_a_decorator(monkeypatch):
    monkeypatch.setattr("flexgen.schedule.ORDERS", registered := dict(ORDERS))

    @order()
    def weights_last(grid):
        for i, j, k in grid.cells():
            yield Step(Op.LOAD_HIDDEN, i, j, k)
            yield Step(Op.LOAD_CACHE, i, j, k)
            if k == 0:
                yield from (Step(Op.LOAD_WEIGHTS, i, j, piece) for piece in range(grid.weight_pieces))
            yield Step(Op.COMPUTE, i, j, k)
            yield Step(Op.STORE_CACHE, i, j, k)
            yield Step(Op.STORE_HIDDEN, i, j, k)

    assert registered["weights_last"] is weights_last
    assert (weights_last.name, weights_last.slots) == ("weights_last", Slots(2, 2))
    assert "weights_last" not in ORDERS
    grid = Grid(3, 2, 2, weight_pieces=3)
    check(registered["weights_last"](grid), grid)


@pytest.mark.parametrize(
    ("overlap", "batches", "host_attends", "name"),
    [
        (False, 1, False, "normal"),
        (False, 4, True, "normal"),
        (True, 1, False, "overlap_single_batch"),
        (True, 1, True, "overlap_single_batch"),
        (True, 2, False, "overlap_multi_batch"),
        (True, 2, True, "overlap_cpu_attention"),
    ],
)
def test_order_for_a_policy(overlap, batches, host_attends, name):
    assert order_for(overlap, batches, host_attends) == name


# What runs beside what, with cells enough


@pytest.mark.parametrize("batches", [2, 3, 4, 8])
def test_cpu_attention_is_issued_with_work_for_the_device_beside_it(batches):
    """Once a cell is attended, the device has another one's halves to do before it needs the answer."""
    slots = ORDERS["overlap_cpu_attention"].slots
    grid = Grid(2, 3, batches, batches, slots.weights, slots.cells, splits_attention=True)
    steps = list(ORDERS["overlap_cpu_attention"](grid))
    place = {step: n for n, step in enumerate(steps)}
    cells = list(grid.cells())
    for before, cell, after in zip(cells, cells[1:], cells[2:], strict=False):
        answer = place[Step(Op.LOAD_ATTENDED, *cell)]
        assert place[Step(Op.ATTEND, *cell)] < place[Step(Op.COMPUTE, *before)]
        assert place[Step(Op.PROJECT, *after)] < answer
        assert place[Step(Op.COMPUTE, *before)] < answer
        if batches > 3:  # and the host has its next cell before it has answered this one
            assert place[Step(Op.ATTEND, *after)] < answer


@pytest.mark.parametrize("batches", [3, 4, 8])
def test_cpu_attention_issues_weights_before_the_layer_before_has_ended(batches):
    slots = ORDERS["overlap_cpu_attention"].slots
    grid = Grid(2, 3, batches, batches, slots.weights, slots.cells, splits_attention=True)
    place = {step: n for n, step in enumerate(ORDERS["overlap_cpu_attention"](grid))}
    for i, j in itertools.product(range(2), range(3)):
        if following := grid.visit(i, j, 1):
            last = max(place[W(*following, piece)] for piece in range(batches))
            assert last < place[Step(Op.PROJECT, i, j, batches - 1)]
