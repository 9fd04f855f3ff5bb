"""The simulator: hand-computed timelines, bounds that hold for every order, and what a real trace predicts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import OPTConfig

from flexgen import OptLM, Policy
from flexgen.predict.numbering import number
from flexgen.predict.timeline import play, simulate, works_of
from flexgen.results.trace import LaneName, Trace
from flexgen.schedule.orders import ORDERS
from flexgen.schedule.steps import Grid, Op, Step

LANES = {
    Op.LOAD_WEIGHTS: LaneName.TO_DEVICE,
    Op.LOAD_CACHE: LaneName.DISK_READ,
    Op.COMPUTE: LaneName.COMPUTE,
    Op.STORE_CACHE: LaneName.DISK_WRITE,
}


def costs_of(seconds):
    """One chain of one stage for each op in `seconds`, nothing for the others."""
    return lambda step: [[(LANES[step.op], seconds[step.op])]] if step.op in seconds else []


def test_normal_is_the_sum():
    grid = Grid(tokens=2, layers=3, batches=2, weight_slots=1, cell_slots=1)
    trace = simulate(ORDERS["normal"](grid), grid, costs_of({Op.LOAD_WEIGHTS: 5.0, Op.COMPUTE: 2.0}))
    assert trace.busy() == {LaneName.TO_DEVICE: 30.0, LaneName.COMPUTE: 24.0}
    assert trace.span == 54.0


def test_overlap_single_batch_by_hand():
    grid = Grid(tokens=1, layers=3, batches=1)
    steps = ORDERS["overlap_single_batch"](grid)
    trace = simulate(steps, grid, costs_of({Op.LOAD_WEIGHTS: 3.0, Op.COMPUTE: 2.0}))
    found = {(e.step.op, e.step.layer): (e.start, e.end) for e in trace.events}
    assert found == {
        (Op.LOAD_WEIGHTS, 0): (0.0, 3.0),
        (Op.LOAD_WEIGHTS, 1): (3.0, 6.0),
        (Op.COMPUTE, 0): (3.0, 5.0),
        (Op.LOAD_WEIGHTS, 2): (6.0, 9.0),  # its slot is free since 5.0, its lane since 6.0
        (Op.COMPUTE, 1): (6.0, 8.0),
        (Op.COMPUTE, 2): (9.0, 11.0),
    }


def test_a_slot_is_not_reused_before_its_layer_has_computed():
    """Two slots for three layers between the ends, which have slots of their own."""
    grid = Grid(tokens=2, layers=5, batches=1)
    trace = simulate(
        ORDERS["overlap_single_batch"](grid), grid, costs_of({Op.LOAD_WEIGHTS: 1.0, Op.COMPUTE: 10.0})
    )
    starts = [e.start for e in trace.events if e.step.op is Op.LOAD_WEIGHTS]
    assert starts == [0.0, 1.0, 2.0, 21.0, 22.0, 23.0, 31.0, 41.0, 71.0, 72.0]


def test_stages_of_a_chain_follow_one_another():
    grid = Grid(tokens=1, layers=1, batches=1)

    def costs(step):
        if step.op is Op.LOAD_WEIGHTS:
            return [[(LaneName.DISK_READ, 2.0), (LaneName.TO_DEVICE, 1.0)], [(LaneName.TO_DEVICE, 4.0)]]
        return [[(LaneName.COMPUTE, 1.0)]] if step.op is Op.COMPUTE else []

    trace = simulate(ORDERS["normal"](grid), grid, costs)
    spans = [(e.lane, e.start, e.end) for e in trace.events]
    assert spans == [
        (LaneName.DISK_READ, 0.0, 2.0),
        (LaneName.TO_DEVICE, 2.0, 3.0),
        (LaneName.TO_DEVICE, 3.0, 7.0),
        (LaneName.COMPUTE, 7.0, 8.0),
    ]


seconds = st.sampled_from([0.0, 0.5, 1.0, 3.0])


grids = st.builds(
    Grid,
    tokens=st.integers(1, 3),
    layers=st.integers(1, 4),
    batches=st.integers(1, 3),
    weight_pieces=st.integers(1, 3),
)


@given(
    grid=grids,
    name=st.sampled_from(sorted(ORDERS)),
    weights=seconds,
    cache=seconds,
    compute=seconds,
    store=seconds,
)
def test_no_order_beats_its_longest_lane_or_loses_to_running_alone(
    grid, name, weights, cache, compute, store
):
    by_op = {Op.LOAD_WEIGHTS: weights, Op.LOAD_CACHE: cache, Op.COMPUTE: compute, Op.STORE_CACHE: store}
    trace = simulate(ORDERS[name](grid), grid, costs_of(by_op))
    busy = trace.busy().values()
    assert max(busy) <= trace.span + 1e-9
    assert trace.span <= sum(busy) + 1e-9
    for lane in LaneName:  # a lane serves one stage at a time
        spans = sorted((e.start, e.end) for e in trace.events if e.lane is lane)
        assert all(a[1] <= b[0] + 1e-9 for a, b in zip(spans, spans[1:], strict=False))


def inline_and_not(name, grid, by_op):
    """Both timelines: on a device that computes in the thread that issues the steps, and on another one."""
    steps = number(ORDERS[name](grid), grid)
    works = works_of(steps, costs_of(by_op))
    return play(steps, works, inline=True), play(steps, works)


def test_a_load_that_is_issued_after_a_computation_waits_for_it_if_the_same_thread_does_both():
    """The weights of the other layers have slots of their own. They are issued with the second batch of the first."""
    grid = Grid(tokens=1, layers=3, batches=2, weight_pieces=2)
    both = inline_and_not("overlap_multi_batch", grid, {Op.LOAD_WEIGHTS: 1.0, Op.COMPUTE: 3.0})
    inline, other = ({e.step: e.start for e in timeline.events} for timeline in both)
    assert inline[Step(Op.COMPUTE, 0, 0, 0)] == other[Step(Op.COMPUTE, 0, 0, 0)] == 2.0
    pieces = [Step(Op.LOAD_WEIGHTS, 0, layer, piece) for layer in (1, 2) for piece in range(2)]
    assert [other[piece] for piece in pieces] == [2.0, 3.0, 4.0, 5.0]
    assert [inline[piece] for piece in pieces] == [5.0, 6.0, 7.0, 8.0]


def test_a_lane_starts_before_the_stage_that_it_works_on_ends():
    """The first three loads have slots. The next one waits for that of the second layer and finds the lane idle."""
    grid = Grid(tokens=1, layers=5, batches=1)
    steps = number(ORDERS["overlap_single_batch"](grid), grid)
    works = works_of(steps, costs_of({Op.LOAD_WEIGHTS: 1.0, Op.COMPUTE: 10.0}))

    def ends(startup):
        timeline = play(steps, works, startup={LaneName.TO_DEVICE: startup})
        return [(e.step.op, e.step.layer, e.end) for e in timeline.events if e.step.op is Op.LOAD_WEIGHTS]

    def loads(*times):
        return [(Op.LOAD_WEIGHTS, layer, time) for layer, time in enumerate(times)]

    assert ends(0.0) == loads(1.0, 2.0, 3.0, 22.0, 23.0)
    assert ends(0.5) == loads(1.5, 2.5, 3.5, 23.0, 24.0)
    assert ends(4.0) == loads(5.0, 6.0, 7.0, 30.0, 31.0)


@given(grid=grids, name=st.sampled_from(sorted(ORDERS)), weights=seconds, compute=seconds, start=seconds)
def test_each_load_starts_at_most_once(grid, name, weights, compute, start):
    steps = number(ORDERS[name](grid), grid)
    works = works_of(steps, costs_of({Op.LOAD_WEIGHTS: weights, Op.COMPUTE: compute}))
    plain, started = (play(steps, works, startup={LaneName.TO_DEVICE: each}) for each in (0.0, start))
    loads = sum(event.lane is LaneName.TO_DEVICE for event in plain.events)
    assert plain.span == play(steps, works).span
    assert plain.span - 1e-9 <= started.span <= plain.span + start * loads + 1e-9


def test_a_computation_starts_later_if_its_thread_has_waited():
    """The second batch of a layer does not wait. The start is at most as long as the wait."""
    grid = Grid(tokens=1, layers=2, batches=2, weight_slots=1, cell_slots=1)
    steps = number(ORDERS["normal"](grid), grid)
    works = works_of(steps, costs_of({Op.LOAD_WEIGHTS: 3.0, Op.COMPUTE: 2.0}))

    def cells(start, inline=True):
        timeline = play(steps, works, inline=inline, startup={LaneName.COMPUTE: start})
        return [(e.start, e.end) for e in timeline.events if e.step.op is Op.COMPUTE]

    assert cells(0.0) == [(3.0, 5.0), (5.0, 7.0), (10.0, 12.0), (12.0, 14.0)]
    assert cells(1.0) == [(3.0, 6.0), (6.0, 8.0), (11.0, 14.0), (14.0, 16.0)]
    assert cells(4.0) == [(3.0, 8.0), (8.0, 10.0), (13.0, 18.0), (18.0, 20.0)]
    assert cells(4.0, inline=False) == cells(0.0)


@given(grid=grids, name=st.sampled_from(sorted(ORDERS)), weights=seconds, compute=seconds, start=seconds)
def test_starts_of_computations_take_no_longer_than_the_waits(grid, name, weights, compute, start):
    steps = number(ORDERS[name](grid), grid)
    works = works_of(steps, costs_of({Op.LOAD_WEIGHTS: weights, Op.COMPUTE: compute}))
    plain, started = (play(steps, works, None, True, {LaneName.COMPUTE: each}) for each in (0.0, start))
    cells = sum(event.lane is LaneName.COMPUTE for event in plain.events)
    loads = sum(event.lane is LaneName.TO_DEVICE for event in plain.events)
    assert plain.span == play(steps, works, inline=True).span
    assert plain.span - 1e-9 <= started.span
    assert started.span <= plain.span + min(start * cells, weights * loads) + 1e-9


@given(grid=grids, name=st.sampled_from(sorted(ORDERS)), weights=seconds, compute=seconds, store=seconds)
def test_nothing_begins_before_the_computations_issued_before_it_if_one_thread_does_both(
    grid, name, weights, compute, store
):
    by_op = {Op.LOAD_WEIGHTS: weights, Op.COMPUTE: compute, Op.STORE_CACHE: store}
    inline, other = inline_and_not(name, grid, by_op)
    computed = 0.0
    for event in inline.events:  # in the order of issue
        assert event.start >= computed
        if event.lane is LaneName.COMPUTE:
            computed = event.end
    assert inline.span >= other.span - 1e-9


def test_an_illegal_order_cannot_be_timed():
    grid = Grid(tokens=1, layers=1, batches=1)
    with pytest.raises(KeyError):
        simulate([Step(Op.COMPUTE, 0, 0, 0)], grid, costs_of({Op.COMPUTE: 1.0}))


@pytest.fixture
def tiny_opt():
    return OPTConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, ffn_dim=128, word_embed_proj_dim=64
    )  # fmt: skip


def test_overlap_beats_normal_by_what_a_trace_predicts(tiny_opt):
    """Stage times measured in a real run, laid out in virtual time under both orders."""
    policy = Policy(
        gpu_batch_size=2, num_gpu_batches=2, weights={"cpu": 100}, cache={"gpu": 100}, overlap=False
    )
    device = "emulated:link=4MB"
    with OptLM(tiny_opt, policy, device=device, dtype="float32", weights="dummy") as model:
        model.generate([[5, 6, 7]] * 4, 3, stop=())
        assert model.stats is not None
        measured: Trace = model.stats.timing.trace
        layers = len(model.layer_names)
    stages: dict[Step, list] = {}
    for step, lane, start, end in measured.events:
        stages.setdefault(step, []).append([(lane, end - start)])
    spans = {}
    for name, slots in (("normal", 1), ("overlap_multi_batch", 2)):
        grid = Grid(tokens=3, layers=layers, batches=2, weight_slots=slots, cell_slots=slots)
        spans[name] = simulate(ORDERS[name](grid), grid, lambda step: stages.get(step, [])).span
    busy = measured.busy()
    # The link is slow enough to be the bottleneck: overlap comes down to it, normal pays for both.
    assert busy[LaneName.TO_DEVICE] > busy[LaneName.COMPUTE]
    assert spans["overlap_multi_batch"] < spans["normal"]
    assert spans["overlap_multi_batch"] >= busy[LaneName.TO_DEVICE]
