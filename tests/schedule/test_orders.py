"""The orders are legal and complete, and issue overlapping steps in the right order."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen.errors import ScheduleError
from flexgen.schedule.orders import ORDERS, Slots, arriving_weights, check_order, order, order_for
from flexgen.schedule.steps import Grid, Op, Step, all_steps, check, needed_visit

SHIPPED = ["normal", "overlap_single_batch", "overlap_multi_batch", "overlap_cpu_attention", "flexgen"]
OVERLAP = SHIPPED[1:4]

grids = st.from_type(Grid)


def W(i, j, piece=0):
    return Step(Op.LOAD_WEIGHTS, i, j, piece)


def test_the_orders_are_registered():
    assert set(SHIPPED) <= set(ORDERS)


@pytest.mark.slow  # thousands of grids; the next test draws some
@pytest.mark.parametrize("name", SHIPPED)
def test_orders_are_legal_on_every_small_grid(name):
    shapes = itertools.product((1, 3), (1, 2, 3), (1, 2, 3, 4, 5))
    for shape, *slots in itertools.product(
        shapes, (1, 2, 5), (2, 3), (2, 3, 4), (False, True), (False, True)
    ):
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


@pytest.mark.parametrize("name", OVERLAP)
@pytest.mark.parametrize(
    "slots", [dict(cell_slots=1), dict(weight_slots=1, weight_pieces=3), dict(weight_slots=1, cell_slots=1)]
)
@pytest.mark.parametrize("batches", [1, 2, 3])
def test_overlap_needs_a_second_slot(name, slots, batches):
    if batches == 1 and "cell_slots" not in slots:
        return  # the weights come right before the computation: no overlap, but legal
    grid = Grid(tokens=2, layers=3, batches=batches, splits_attention=ORDERS[name].splits_attention, **slots)
    with pytest.raises(ScheduleError, match="is issued before"):
        check(ORDERS[name](grid), grid)
    check(ORDERS["normal"](grid), grid)


@given(grid=grids)
def test_weights_are_spread_over_the_batches_earliest_first(grid):
    """Those of each visit but the first, once: no sooner than their slot is free, no later than an even spread.
    In the first layer, they come with the last batch, after the loads of ids."""
    arrivals = list(arriving_weights(grid))
    steps = [Step(Op.LOAD_WEIGHTS, 0, 0, piece) for piece in range(grid.weight_pieces)]
    assert steps + list(itertools.chain(*arrivals)) == [
        step for step in all_steps(grid) if step.op is Op.LOAD_WEIGHTS
    ]
    for visit in range(grid.tokens * grid.layers):
        arriving = arrivals[visit * grid.batches : (visit + 1) * grid.batches]
        for step in itertools.chain(*arriving):
            before = needed_visit(step, grid)
            assert before is None or before.token * grid.layers + before.layer < visit
        if visit % grid.layers == 0:
            assert not any(arriving[:-1])
            continue
        assert max(map(len, arriving)) - min(map(len, arriving)) <= 1
        whole, issued = sum(map(len, arriving)), itertools.accumulate(map(len, arriving))
        assert all(count * grid.batches >= n * whole for n, count in enumerate(issued, 1))


@pytest.mark.parametrize("name", ["overlap_single_batch", "overlap_multi_batch"])
@pytest.mark.parametrize("batches", [1, 4])
def test_weights_of_the_next_token_are_issued_before_the_head_is_computed(name, batches):
    """If the computation blocks the issuing thread, no later step is in flight during it."""
    asked = ORDERS[name]
    grid = asked.grid(2, 6, batches, batches)
    steps = list(asked(grid))
    arriving = [W(1, layer, piece) for layer in (0, 1) for piece in range(batches)]
    assert max(map(steps.index, arriving)) < steps.index(Step(Op.COMPUTE, 0, 5, batches - 1))


def test_a_custom_order_is_a_generator_and_a_decorator(monkeypatch):
    monkeypatch.setattr("flexgen.schedule.orders.ORDERS", registered := dict(ORDERS))

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


# Steps that overlap, with enough cells


@pytest.mark.parametrize("batches", [2, 3, 4, 8])
def test_cpu_attention_is_issued_with_work_for_the_device(batches):
    """After the attention of a cell, the device computes halves of another cell before it needs the output."""
    slots = ORDERS["overlap_cpu_attention"].slots
    grid = Grid(2, 3, batches, batches, slots.weights, slots.cells, splits_attention=True)
    steps = list(ORDERS["overlap_cpu_attention"](grid))
    place = {step: n for n, step in enumerate(steps)}
    cells = list(grid.cells())
    for before, cell, after in zip(cells, cells[1:], cells[2:], strict=False):
        answer = place[Step(Op.LOAD_ATTENTION, *cell)]
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


def test_of_two_cells_one_stores_its_cache_while_the_device_computes_the_other():
    """Not before an attention that the device needs next."""
    order = ORDERS["overlap_cpu_attention"]
    grid = order.grid(2, 4, 2, 1)
    steps = list(order(grid))
    check(steps, grid)
    place = {step: n for n, step in enumerate(steps)}
    cells = list(grid.cells())
    for cell, after, attending in zip(cells, cells[2:], cells[3:], strict=False):
        stored = place[Step(Op.STORE_CACHE, *cell)]
        assert place[Step(Op.ATTEND, *attending)] < stored < place[Step(Op.COMPUTE, *after)]


def test_with_one_cell_the_output_of_attention_comes_before_the_next_weights():
    """They use the same lane, and the layer that computes with the output has the slot of further weights."""
    order = ORDERS["overlap_cpu_attention"]
    grid = order.grid(2, 10, 1, 2)
    place = {step: n for n, step in enumerate(order(grid))}
    for layer in range(2, 7):
        weights = [place[W(0, layer + 2, piece)] for piece in range(2)]
        answer, rest = (place[Step(op, 0, layer)] for op in (Op.LOAD_ATTENTION, Op.COMPUTE))
        assert answer < min(weights) and max(weights) < rest


@pytest.mark.parametrize("name", sorted(ORDERS))
def test_orders_that_are_there_pass_the_check_of_an_opened_model(name):
    check_order(name)


def test_an_order_that_is_not_legal_is_refused_by_name():
    with pytest.raises(
        ScheduleError,
        match=r"'norma' is not known; known: .*did you mean 'normal'.*register your order with @order",
    ):
        check_order("norma")

    def forgets_the_last_layer(grid):
        yield from (step for step in ORDERS["normal"](grid) if grid.layers < 5 or step.layer < 4)

    order()(forgets_the_last_layer)
    try:
        with pytest.raises(
            ScheduleError, match=r"'forgets_the_last_layer' with 1 tokens, 5 layers.* never issued"
        ):
            check_order("forgets_the_last_layer")
    finally:
        del ORDERS["forgets_the_last_layer"]


@pytest.mark.parametrize("name", sorted(ORDERS))
def test_with_one_batch_all_orders_compute_in_the_same_order(name):
    """So a run in which nothing moves needs no order (`Generation.steps`)."""
    grid = Grid(tokens=4, layers=5, batches=1, weight_pieces=2, weight_slots=3, cell_slots=4)
    head = grid.layers - 1
    issued = [
        step
        for step in ORDERS[name](grid)
        if step.op is Op.COMPUTE or (step.op is Op.STORE_HIDDEN and step.layer == head)
    ]
    each = [*((Op.COMPUTE, j) for j in range(grid.layers)), (Op.STORE_HIDDEN, head)]
    assert issued == [Step(op, i, j) for i in range(grid.tokens) for op, j in each]
