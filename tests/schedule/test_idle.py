from hypothesis import given
from hypothesis import strategies as st

from flexgen.schedule.idle import BusySteps, Place, busy_steps
from flexgen.schedule.steps import Grid, Op, Step, all_steps, needs

grids = st.builds(
    Grid,
    tokens=st.integers(1, 7),
    layers=st.integers(1, 5),
    batches=st.integers(1, 3),
    weight_pieces=st.integers(1, 2),
    weight_slots=st.integers(1, 4),
    cell_slots=st.integers(1, 4),
    splits_attention=st.booleans(),
    feeds_ids=st.booleans(),
)


def place(step):
    return Place(step.op, step.layer, step.batch)


def without(idle, step, grid):
    """The needs of a step, with those of idle steps in place of these, found step by step."""
    found = set()
    for other in needs(step, grid):
        if place(other) not in idle:
            found.add(other)
        elif other.op is not Op.LOAD_WEIGHTS:
            found |= without(idle, other, grid)
    return found


@given(grid=grids, data=st.data())
def test_a_step_needs_the_needs_of_idle_steps_in_their_place(grid, data):
    places = sorted({place(step) for step in all_steps(grid) if step.op is not Op.COMPUTE}, key=str)
    idle = frozenset(data.draw(st.sets(st.sampled_from(places))))
    busy = BusySteps(grid, idle)
    for step in all_steps(grid):
        if place(step) not in idle:
            found = busy.needs(step)
            assert set(found) == without(idle, step, grid)
            assert len(set(found)) == len(found)


@given(grid=grids)
def test_without_idle_steps_all_needs_are_those_of_the_schedule(grid):
    busy = BusySteps(grid, frozenset())
    for step in all_steps(grid):
        assert set(busy.needs(step)) == set(needs(step, grid))


def test_weights_in_place_do_not_wait_for_a_slot():
    grid = Grid(tokens=2, layers=5, batches=3, weight_slots=2, cell_slots=1)
    idle = frozenset(place(step) for step in all_steps(grid) if step.op is not Op.COMPUTE)
    assert set(BusySteps(grid, idle).needs(Step(Op.COMPUTE, 1, 3, 0))) == {
        Step(Op.COMPUTE, 0, 3, 0),  # its cache
        Step(Op.COMPUTE, 1, 2, 0),  # its hidden states
        Step(Op.COMPUTE, 1, 2, 2),  # its buffers
    }


def test_the_stores_of_a_pass_are_those_with_work():
    grid = Grid(tokens=2, layers=3, batches=1)
    idle = frozenset({Place(Op.STORE_CACHE, 0, 0), Place(Op.STORE_CACHE, 2, 0)})
    assert BusySteps(grid, idle).stores(1) == [Step(Op.STORE_HIDDEN, 1, 2, 0), Step(Op.STORE_CACHE, 1, 1, 0)]


def test_needs_are_kept_for_runs_of_any_length():
    idle = frozenset({Place(Op.STORE_CACHE, 0, 0)})
    assert busy_steps(Grid(5, 3, 1), idle) is busy_steps(Grid(9, 3, 1), idle)
    assert busy_steps(Grid(5, 3, 2), idle) is not busy_steps(Grid(5, 3, 1), idle)


@given(layers=st.integers(3, 7), cell_slots=st.integers(1, 4), data=st.data())
def test_who_needs_an_included_computation_waits_for_the_one_that_includes_it(layers, cell_slots, data):
    grid = Grid(tokens=7, layers=layers, batches=1, cell_slots=cell_slots)
    included = data.draw(st.sets(st.integers(2, layers - 2)) if layers > 3 else st.just(set()))
    ids = Step(Op.STORE_HIDDEN, 0, layers - 1, 0)
    idle = {place(step) for step in all_steps(grid) if step.op is not Op.COMPUTE} - {place(ids)}
    before = BusySteps(grid, frozenset(idle))
    after = BusySteps(grid, frozenset(idle | {Place(Op.COMPUTE, j, 0) for j in included}))

    def including(step):
        while step.op is Op.COMPUTE and step.layer in included:
            step = step._replace(layer=step.layer - 1)
        return step

    for step in all_steps(grid):
        if place(step) not in idle and including(step) == step:
            assert set(after.needs(step)) == {including(other) for other in before.needs(step)}


def test_the_needs_of_runs_with_different_numbers_of_cells_are_kept():
    grids = [Grid(tokens=1, layers=3, batches=cells) for cells in range(1, 17)]
    made = [busy_steps(grid, frozenset()) for grid in grids]
    assert all(busy_steps(grid, frozenset()) is busy for grid, busy in zip(grids, made, strict=True))


@given(
    layers=st.integers(2, 4),
    batches=st.integers(2, 5),
    cell_slots=st.integers(1, 4),
    data=st.data(),
)
def test_a_computation_of_several_batches_waits_for_what_each_of_them_needs(
    layers, batches, cell_slots, data
):
    grid = Grid(tokens=7, layers=layers, batches=batches, cell_slots=cell_slots)
    included = data.draw(st.sets(st.integers(1, batches - 1)))
    ids = {Place(Op.STORE_HIDDEN, layers - 1, k) for k in range(batches)}
    idle = {place(step) for step in all_steps(grid) if step.op is not Op.COMPUTE} - ids
    before = BusySteps(grid, frozenset(idle))
    after = BusySteps(
        grid, frozenset(idle | {Place(Op.COMPUTE, j, k) for j in range(1, layers) for k in included})
    )

    def including(step):
        while step.op is Op.COMPUTE and step.layer and step.batch in included:
            step = step._replace(batch=step.batch - 1)
        return step

    expected: dict[Step, set[Step]] = {}
    for step in all_steps(grid):
        if place(step) not in idle:
            expected.setdefault(including(step), set()).update(map(including, before.needs(step)))
    for step, needed in expected.items():
        # Each batch has a result of its own, so that the computation waits for no store of another batch of its own.
        own = {other for other in needed if including(other._replace(op=Op.COMPUTE)) == step}
        assert set(after.needs(step)) == needed - own


def test_a_computation_of_several_batches_needs_no_store_of_its_own():
    grid = Grid(tokens=2, layers=3, batches=3, cell_slots=2)
    ids = {Place(Op.STORE_HIDDEN, 2, k) for k in range(3)}
    idle = {place(step) for step in all_steps(grid) if step.op is not Op.COMPUTE} - ids
    busy = BusySteps(grid, frozenset(idle | {Place(Op.COMPUTE, j, k) for j in (1, 2) for k in (1, 2)}))
    assert set(busy.needs(Step(Op.COMPUTE, 0, 1, 0))) == {Step(Op.COMPUTE, 0, 0, k) for k in range(3)}
    assert set(busy.needs(Step(Op.COMPUTE, 0, 2, 0))) == {Step(Op.COMPUTE, 0, 1, 0)}
    assert set(busy.needs(Step(Op.STORE_HIDDEN, 0, 2, 1))) == {Step(Op.COMPUTE, 0, 2, 0)}
