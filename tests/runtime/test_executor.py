"""The loop: nothing starts before what it needs, an early end is an end, and errors reach the caller."""

import random
import signal
import sys
import threading
from contextlib import closing, contextmanager
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen.errors import LaneError
from flexgen.memory.disk_lane import DiskLane
from flexgen.memory.lanes import InlineLane, Lane, Lanes, ThreadLane
from flexgen.memory.transfer import Stage
from flexgen.results.trace import LaneName
from flexgen.runtime import executor
from flexgen.runtime.executor import execute
from flexgen.schedule.idle import Place
from flexgen.schedule.orders import ORDERS
from flexgen.schedule.steps import Grid, Op, Step, all_steps, check, needs

SHIPPED = ["normal", "overlap_single_batch", "overlap_multi_batch", "overlap_cpu_attention"]
PATIENCE = 60  # seconds after which a test that hangs fails instead


class Boom(Exception):
    pass


def place(step):
    return Place(step.op, step.layer, step.batch)


class Logged:
    """Work whose steps are chains of stages on random lanes; it watches what starts and what has ended.

    A step may have no work at all, except for COMPUTE, or be idle in all tokens. `hooks` maps a step to what happens
    inside its first stage; `only` maps a step to the lane of its one stage.
    """

    def __init__(self, grid, seed=0, stop_after=None, hooks=None, only=None):
        self.grid = grid
        self.can_finish = stop_after is not None
        self.asked = []
        self.started = []  # steps, at each stage
        self.running = 0
        self.hooks = hooks or {}
        self._stop_after = stop_after
        self._lock = threading.Lock()
        self._needs = {step: needs(step, grid) for step in all_steps(grid)}
        shapes = random.Random(seed)
        lanes = list(LaneName)
        self.shape = {}  # lanes of each chain of each step
        for step in all_steps(grid):
            count = 1 if step.op is Op.COMPUTE or step in self.hooks else shapes.choice((0, 1, 1, 2))
            self.shape[step] = [shapes.choices(lanes, k=shapes.choice((1, 1, 2, 3))) for _ in range(count)]
        self.shape |= {step: [[lane]] for step, lane in (only or {}).items()}
        needed = {place(step) for step in (*self.hooks, *(only or ()))}
        needed |= {Place(Op.STORE_HIDDEN, grid.layers - 1, k) for k in range(grid.batches)}
        places = sorted({place(step) for step in self.shape if step.op is not Op.COMPUTE}, key=str)
        self.idle = frozenset(one for one in places if one not in needed and shapes.random() < 0.3)
        self.shape |= {step: [] for step in self.shape if place(step) in self.idle}
        self._left = {step: sum(map(len, chains)) for step, chains in self.shape.items()}
        self._spin = random.Random(seed + 1)

    def chains(self, step):
        return tuple(
            tuple(Stage(lane, partial(self._run, step, n, begins=m == 0)) for m, lane in enumerate(lanes))
            for n, lanes in enumerate(self.shape[step])
        )

    def _run(self, step, chain, begins):
        hook = self.hooks.get(step) if begins and chain == 0 else None
        with self._lock:
            self.running += 1
            self.started.append(step)
            late = [need for need in self._needs[step] if not self.complete(need)] if begins else []
            turns = self._spin.randrange(200)
        try:
            assert not late, f"{step} has started before the end of {late[0]}"
            for _ in range(turns):  # lets other threads come between, some time
                pass
            if hook:
                hook()
        finally:
            with self._lock:
                self.running -= 1
                self._left[step] -= 1

    def complete(self, step):
        """Whether all stages have ended; a step without work is over when what it needs is."""
        if self._left[step]:
            return False
        if step.op is Op.LOAD_WEIGHTS and place(step) in self.idle:
            return True  # without a slot, the load needs nothing
        return bool(self.shape[step]) or all(self.complete(need) for need in self._needs[step])

    def finished(self, token):
        heads = [Step(Op.STORE_HIDDEN, token, self.grid.layers - 1, k) for k in range(self.grid.batches)]
        with self._lock:
            assert all(self.complete(head) for head in heads), "ids of the token are not known yet"
        self.asked.append(token)
        return token == self._stop_after

    @property
    def stages(self):
        return sum(len(chain) for chains in self.shape.values() for chain in chains)


def make_lanes(kinds):
    """`kinds` by lane: "thread", "inline", "disk", a lane, or the name of an earlier one that serves this one too."""
    lanes = {}
    for name in LaneName:
        kind = kinds.get(name, "thread")
        if isinstance(kind, Lane):
            lanes[name] = kind
        elif kind in KINDS:
            lanes[name] = KINDS[kind](name)
        else:
            lanes[name] = lanes[kind]
    return Lanes(lanes)


KINDS = {"thread": ThreadLane, "inline": InlineLane, "disk": DiskLane}
THREADS, INLINE = {}, dict.fromkeys(LaneName, "inline")


@contextmanager
def restless_threads():
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def run(name, grid, work, lanes, leave_out_idle=True):
    steps = ORDERS[name](grid)
    if leave_out_idle:
        steps = (step for step in steps if place(step) not in work.idle)
    return execute(steps, grid, work, lanes)


grids = st.builds(
    Grid,
    tokens=st.integers(1, 5),
    layers=st.integers(1, 4),
    batches=st.integers(1, 5),
    weight_pieces=st.integers(1, 3),
    weight_slots=st.integers(2, 4),
    cell_slots=st.integers(2, 4),
    splits_attention=st.booleans(),
)
kinds = st.fixed_dictionaries(
    {name: st.sampled_from(["thread", "disk", "inline", LaneName.COMPUTE]) for name in list(LaneName)[1:]}
    | {LaneName.COMPUTE: st.sampled_from(["thread", "inline"])}
)


@settings(max_examples=80)
@given(
    grid=grids,
    name=st.sampled_from(SHIPPED),
    kinds=kinds,
    seed=st.integers(0, 1 << 16),
    leave_out_idle=st.booleans(),
)
def test_nothing_starts_before_what_it_needs(grid, name, kinds, seed, leave_out_idle):
    work = Logged(grid, seed)
    with closing(make_lanes(kinds)) as lanes, restless_threads():
        trace = run(name, grid, work, lanes, leave_out_idle)
    assert all(work.complete(step) for step in all_steps(grid))
    assert len(work.started) == len(trace.events) == work.stages
    assert all(0 <= event.start <= event.end for event in trace.events)


@settings(max_examples=20)
@given(grid=grids, batches=st.integers(1, 3), seed=st.integers(0, 1 << 16))
def test_one_slot_of_each_kind_is_enough_without_overlap(grid, batches, seed):
    grid = Grid(grid.tokens, grid.layers, batches, grid.weight_pieces, weight_slots=1, cell_slots=1)
    work = Logged(grid, seed)
    with closing(make_lanes(THREADS)) as lanes, restless_threads():
        run("normal", grid, work, lanes)
    assert len(work.started) == work.stages


def test_more_steps_than_may_be_on_their_way_at_once():
    grid = Grid(tokens=6, layers=6, batches=4)
    assert len(list(all_steps(grid))) > 2 * executor._WINDOW
    for kinds in (THREADS, INLINE):
        work = Logged(grid, seed=3)
        with closing(make_lanes(kinds)) as lanes:
            run("overlap_multi_batch", grid, work, lanes)
        assert len(work.started) == work.stages


def test_each_lane_serves_in_the_order_of_the_schedule():
    grid = Grid(tokens=3, layers=3, batches=2)
    place = {step: n for n, step in enumerate(ORDERS["overlap_multi_batch"](grid))}
    with closing(make_lanes(THREADS)) as lanes:
        trace = run("overlap_multi_batch", grid, Logged(grid, seed=5), lanes)
    for lane in LaneName:
        served = [place[event.step] for event in trace.events if event.lane is lane]
        assert len(served) > 5 and served == sorted(served)


# The end of generation


@settings(max_examples=40)
@given(grid=grids, name=st.sampled_from(SHIPPED), kinds=kinds, data=st.data())
def test_an_early_end_computes_nothing_of_later_tokens(grid, name, kinds, data):
    last = data.draw(st.integers(0, grid.tokens - 1))
    work = Logged(grid, data.draw(st.integers(0, 1 << 16)), stop_after=last)
    with closing(make_lanes(kinds)) as lanes, restless_threads():
        run(name, grid, work, lanes)
        count = len(work.started)
        assert work.running == 0
        lanes.stop(cancel=False)
        assert len(work.started) == count, "a step has run after the end"
    computed = {step.token for step in work.started if step.op is Op.COMPUTE}
    assert computed == set(range(last + 1))
    assert all(work.complete(step) for step in all_steps(grid) if step.token <= last)
    assert work.asked == list(range(min(last + 1, grid.tokens - 1)))  # once for each token with one after it


def test_who_cannot_finish_is_not_asked():
    grid = Grid(tokens=4, layers=2, batches=2)
    for name in SHIPPED:
        work = Logged(grid)
        with closing(make_lanes(THREADS)) as lanes:
            run(name, grid, work, lanes)
        assert work.asked == []


# Failures


def boom():
    raise Boom("out of luck")


def assert_usable(name, grid, lanes):
    """The next run on the same lanes is a full one, and its trace is its own."""
    work = Logged(grid, seed=9)
    trace = run(name, grid, work, lanes)
    assert len(work.started) == len(trace.events) == work.stages
    assert all(event.start >= 0 for event in trace.events)


@pytest.mark.parametrize("kinds", [THREADS, INLINE], ids=["threads", "inline"])
@pytest.mark.parametrize(
    "name",
    [
        "normal",
        "overlap_cpu_attention",
        pytest.param("overlap_single_batch", marks=pytest.mark.slow),
        pytest.param("overlap_multi_batch", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("op", list(Op))
def test_a_failure_of_any_step_reaches_the_caller(op, name, kinds):
    grid = Grid(tokens=3, layers=2, batches=2, splits_attention=True)
    failing = Step(op, 1, 1, 0)
    for seed, lane in enumerate(LaneName):
        work = Logged(grid, seed, hooks={failing: boom}, only={failing: lane})
        with closing(make_lanes(kinds)) as lanes:
            with pytest.raises(LaneError, match=f"{op.name.lower()} of token 1, layer 1") as caught:
                run(name, grid, work, lanes)
            assert isinstance(caught.value.__cause__, Boom)
            assert f"failed on lane {lane}: Boom: out of luck" in str(caught.value)
            count = len(work.started)
            assert work.running == 0
            lanes.stop(cancel=False)
            assert len(work.started) == count, "a step has run after the failure"
            assert_usable(name, grid, lanes)


@settings(max_examples=30)
@given(grid=grids, name=st.sampled_from(SHIPPED), kinds=kinds, data=st.data())
def test_what_needs_a_failed_step_does_not_run(grid, name, kinds, data):
    failing = data.draw(st.sampled_from(list(all_steps(grid))))
    work = Logged(grid, data.draw(st.integers(0, 1 << 16)), hooks={failing: boom})
    with closing(make_lanes(kinds)) as lanes, restless_threads():
        with pytest.raises(LaneError) as caught:
            run(name, grid, work, lanes)
        assert isinstance(caught.value.__cause__, Boom)
        started = set(work.started)
        tainted = {failing}
        for step in ORDERS[name](grid):
            if tainted.intersection(needs(step, grid)):
                tainted.add(step)
                assert step not in started
        assert_usable(name, grid, lanes)


def test_a_failure_to_make_the_work_leaves_the_lanes_idle():
    grid = Grid(tokens=2, layers=2, batches=2)

    class Unable(Logged):
        def chains(self, step):
            return super().chains(step) if step.token == 0 else boom()

    work = Unable(grid)
    with closing(make_lanes(THREADS)) as lanes:
        with pytest.raises(Boom):
            run("overlap_multi_batch", grid, work, lanes)
        assert work.running == 0
        assert_usable("overlap_multi_batch", grid, lanes)


# Interrupts


@pytest.mark.parametrize("name", SHIPPED)
def test_an_interrupt_inside_an_inline_job(name):
    grid = Grid(tokens=3, layers=2, batches=2)

    def interrupt():
        raise KeyboardInterrupt

    step = Step(Op.COMPUTE, 1, 1, 0)
    work = Logged(grid, seed=2, hooks={step: interrupt}, only={step: LaneName.COMPUTE})
    with closing(make_lanes({LaneName.COMPUTE: "inline"})) as lanes:
        with pytest.raises(KeyboardInterrupt):
            run(name, grid, work, lanes)
        count = len(work.started)
        assert work.running == 0
        lanes.stop(cancel=False)
        assert len(work.started) == count
        assert_usable(name, grid, lanes)


class OpenedByCancel(ThreadLane):
    """Lets a job continue once the lane is asked to drop the jobs behind it."""

    def __init__(self, name, opened):
        super().__init__(name)
        self._opened = opened

    def cancel(self):
        super().cancel()
        self._opened.set()


@pytest.mark.parametrize("name", SHIPPED)
def test_an_interrupt_while_the_caller_waits(name):
    grid = Grid(tokens=2, layers=2, batches=2)
    opened, after = threading.Event(), []

    def interrupt():
        # A signal that arrives just before the caller begins to wait does not end the wait, but the next one does.
        for _ in range(4):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            if opened.wait(PATIENCE / 4):
                return
        raise AssertionError("the caller did not notice the interrupt")

    hooks = {Step(Op.COMPUTE, 0, 1, 0): interrupt, Step(Op.COMPUTE, 0, 1, 1): lambda: after.append(1)}
    work = Logged(grid, seed=4, hooks=hooks, only=dict.fromkeys(hooks, LaneName.COMPUTE))
    with closing(make_lanes({LaneName.COMPUTE: OpenedByCancel(LaneName.COMPUTE, opened)})) as lanes:
        with pytest.raises(KeyboardInterrupt):
            run(name, grid, work, lanes)
        assert work.running == 0 and after == [], "what had not begun is dropped"
        assert_usable(name, grid, lanes)


def test_steps_are_named_by_the_tokens_of_the_call():
    grid, tokens = Grid(3, layers=2, batches=1), [4, 9, 11]

    def broken():
        raise Boom

    with closing(make_lanes({})) as lanes:
        work = Logged(grid)
        trace = execute(ORDERS["normal"](grid), grid, work, lanes, tokens)
        assert {event.step.token for event in trace.events} == set(tokens)
        assert {step.token for step in work.started} == {0, 1, 2}, "work knows them by the grid"
        work = Logged(grid, hooks={Step(Op.COMPUTE, 1, 1, 0): broken})
        with pytest.raises(LaneError, match="compute of token 9, layer 1, batch 0 failed"):
            execute(ORDERS["normal"](grid), grid, work, lanes, tokens)


# Ending early


def test_a_run_ends_when_all_of_its_last_token_has_been_issued():
    """A later call continues from the cache of that token, so an order that stores it late must not lose it."""
    grid = Grid(3, layers=3, batches=1, cell_slots=3)
    late, head = Step(Op.STORE_CACHE, 0, 2, 0), Step(Op.COMPUTE, 1, 0, 0)
    steps = [step for step in ORDERS["overlap_single_batch"](grid) if step != late]
    steps.insert(steps.index(head) + 1, late)
    check(steps, grid)
    work = Logged(grid, stop_after=0, hooks={late: lambda: None})
    with closing(make_lanes({})) as lanes:
        execute(iter(steps), grid, work, lanes)
    assert work.asked == [0] and work.complete(late)
    assert not work.complete(Step(Op.COMPUTE, 2, 0, 0))


# Memory


@pytest.mark.parametrize("name", SHIPPED)
def test_what_is_remembered_does_not_grow_with_the_tokens(name):
    def most(tokens):
        grid = Grid(tokens, layers=2, batches=2, weight_pieces=2)
        work = Logged(grid)
        with closing(make_lanes(INLINE)) as lanes:
            loop, sizes = executor._Run(grid, work, lanes), []
            for step in ORDERS[name](grid):
                assert not loop.at_end(step)
                loop.issue(step)
                sizes.append(len(loop._done) + len(loop._pending))
            loop.wait()
        return max(sizes)

    assert most(100) == most(50)
