"""The needs of steps, and `check`, which must find every kind of illegal or incomplete order."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen.errors import ScheduleError
from flexgen.schedule.orders import ORDERS
from flexgen.schedule.steps import Cell, Grid, Op, Step, all_steps, check, needs

SHIPPED = sorted(ORDERS)

grids = st.from_type(Grid)


def W(i, j, piece=0):
    return Step(Op.LOAD_WEIGHTS, i, j, piece)


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


@pytest.mark.parametrize(
    "field", [f for f in Grid.__dataclass_fields__ if f not in ("splits_attention", "feeds_ids")]
)
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
        # Weights take the slot of two visits before, once both batches of that visit are computed; those of the
        # first layer and of the last one have slots of their own.
        (W(0, 1), []),
        (W(0, 2), []),
        (W(1, 2), [(Op.COMPUTE, 0, 2, 0), (Op.COMPUTE, 0, 2, 1)]),
        (W(1, 0), [(Op.COMPUTE, 0, 0, 0), (Op.COMPUTE, 0, 0, 1)]),
        (W(2, 1), [(Op.COMPUTE, 0, 1, 0), (Op.COMPUTE, 0, 1, 1)]),
        # Hidden states come from the layer before; ids of a later token from the head of the one before.
        (Step(Op.LOAD_HIDDEN, 0, 1, 0), [(Op.STORE_HIDDEN, 0, 0, 0), (Op.COMPUTE, 0, 0, 0)]),
        (Step(Op.LOAD_HIDDEN, 1, 0, 1), [(Op.STORE_HIDDEN, 0, 2, 1), (Op.COMPUTE, 0, 2, 1)]),
        # The cache of a later token was stored by the token before it; its slot is that of two cells before.
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
        # The ids of a later token are chosen by the device.
        (Step(Op.LOAD_HIDDEN, 1, 0, 1), [(Op.COMPUTE, 0, 2, 1), (Op.COMPUTE, 0, 2, 1)]),  # the slot's last user too
        (Step(Op.LOAD_HIDDEN, 1, 1, 1), [(Op.STORE_HIDDEN, 1, 0, 1), (Op.COMPUTE, 1, 0, 1)]),
        # They have no cell slot that the next cells would wait for: the host has the time of a token to take them.
        (
            Step(Op.COMPUTE, 1, 0, 0),
            [W(1, 0, 0), W(1, 0, 1), (Op.LOAD_CACHE, 1, 0, 0), (Op.LOAD_HIDDEN, 1, 0, 0), (Op.STORE_CACHE, 0, 2, 0)],
        ),
        (
            Step(Op.COMPUTE, 1, 2, 1),
            [
                *(W(1, 2, 0), W(1, 2, 1), (Op.LOAD_CACHE, 1, 2, 1), (Op.LOAD_HIDDEN, 1, 2, 1)),
                *((Op.STORE_HIDDEN, 1, 1, 1), (Op.STORE_CACHE, 1, 1, 1), (Op.STORE_HIDDEN, 0, 2, 1)),
            ],
        ),
    ],
)  # fmt: skip
def test_needs_where_the_device_feeds_the_ids(step, expected):
    grid = Grid(tokens=2, layers=3, batches=2, weight_pieces=2, feeds_ids=True)
    assert sorted(needs(step, grid), key=str) == sorted((Step(*s) for s in expected), key=str)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        # The host is asked as soon as the device has the cell's input, and needs its cache only to answer.
        (Step(Op.PROJECT, 0, 0, 0), [W(0, 0, 0), W(0, 0, 1), (Op.LOAD_HIDDEN, 0, 0, 0)]),
        (Step(Op.ATTEND, 1, 1, 0), [(Op.PROJECT, 1, 1, 0), (Op.LOAD_CACHE, 1, 1, 0)]),
        (Step(Op.LOAD_ATTENTION, 1, 1, 0), [(Op.ATTEND, 1, 1, 0)]),
        # Its queries and output are in the slot of three cells before, which has been computed.
        (
            Step(Op.PROJECT, 1, 2, 1),
            [W(1, 2, 0), W(1, 2, 1), (Op.LOAD_HIDDEN, 1, 2, 1), (Op.COMPUTE, 1, 1, 0)],
        ),
        (
            Step(Op.COMPUTE, 1, 2, 1),
            [(Op.LOAD_ATTENTION, 1, 2, 1), (Op.STORE_HIDDEN, 1, 1, 0), (Op.STORE_CACHE, 1, 1, 0)],
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
    """The needs of a step include the previous user of its slot."""
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
