"""The only loop: issues the steps of a schedule to lanes, in order, each after the steps that it needs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Protocol

from flexgen.memory.lanes import Done, Lanes
from flexgen.memory.transfer import Chains
from flexgen.results.trace import Trace
from flexgen.schedule.idle import Place, busy_steps
from flexgen.schedule.steps import Grid, Op, Step

_WINDOW = 256
"""The maximum number of issued steps that are not done. It limits memory and the delay of Ctrl-C."""


class Work(Protocol):
    """The work of the steps of a schedule."""

    @property
    def idle(self) -> frozenset[Place]:
        """Steps without work of their own in every pass, which a schedule may leave out. The stores of new ids are
        never idle."""

    def chains(self, step: Step) -> Chains:
        """The work of a step, or () if its data is already in place."""

    @property
    def can_finish(self) -> bool:
        """Whether generation may end before the last token. Only then does the loop wait for the end of each
        token."""

    def finished(self, token: int) -> bool:
        """Whether the run ends with token `token`, which is known for every row of the block.

        All steps of the token have been issued by then, and are done when `execute` returns.
        """


def execute(
    steps: Iterable[Step], grid: Grid, work: Work, lanes: Lanes, tokens: Sequence[int] | None = None
) -> Trace:
    """Run a schedule and return its trace, in seconds since the call.

    tokens: the tokens of the call, one for each token of the grid, which name steps in the trace and in errors. None
        uses the tokens of the grid.

    Steps go to their lanes in the order of the schedule, and lanes run jobs in order, so a schedule that
    `schedule.check` accepts cannot deadlock. Raises LaneError, with its cause, if a step fails. By then, no lane
    accesses a buffer; this is also true after Ctrl-C.
    """
    origin = time.perf_counter()
    run = _Run(grid, work, lanes, tokens)
    completed = False
    try:
        for step in steps:
            if run.at_end(step):
                break
            run.issue(step)
        run.wait()
        completed = True
    finally:
        try:
            lanes.stop(cancel=not completed)
        finally:  # also those of a failed run, which must not appear in the next one
            events = lanes.take_events(origin)
    return Trace(events)


class _Run:
    """The steps that have been issued so far."""

    def __init__(self, grid: Grid, work: Work, lanes: Lanes, tokens: Sequence[int] | None = None) -> None:
        self._tokens = range(grid.tokens) if tokens is None else tokens
        self._grid = grid
        self._busy = busy_steps(grid, work.idle)
        self._work = work
        self._lanes = lanes
        self._done: dict[Step, tuple[Done, ...]] = {}
        self._pending: deque[tuple[Done, ...]] = deque()
        self._token = 0  # the latest token whose predecessors have ended

    def issue(self, step: Step) -> None:
        needed = self._busy.needs(step)
        after = tuple({id(done): done for other in needed for done in self._done[other]}.values())
        chains = self._work.chains(step)
        if not chains:
            self._done[step] = after  # done when the steps that it needs are done
            return
        ends: list[Done] = []
        named = step._replace(token=self._tokens[step.token])
        for chain in chains:
            waits = after
            for lane, job in chain:
                waits = (self._lanes[lane].submit(job, waits, named),)
            ends += waits
        self._done[step] = tuple(ends)
        self._pending.append(tuple(ends))
        if len(self._pending) > _WINDOW:
            _wait_all(self._pending.popleft())

    def at_end(self, step: Step) -> bool:
        """Whether the run has ended with the previous token. Checked at the first computation of a token."""
        if step.op is not Op.COMPUTE or step.token <= self._token:
            return False
        before = step.token - 1
        stores = self._busy.stores(before)
        if any(store not in self._done for store in stores):
            return False  # the order has not issued all of the previous token: check again later
        self._token = step.token
        # No step needs a step that is more slots behind.
        oldest = before - max(self._grid.weight_slots, self._grid.cell_slots)
        self._done = {old: done for old, done in self._done.items() if old.token >= oldest}
        if not self._work.can_finish:
            return False
        for store in stores:
            if store.op is Op.STORE_HIDDEN:  # new ids
                _wait_all(self._done[store])
        return self._work.finished(before)

    def wait(self) -> None:
        while self._pending:
            _wait_all(self._pending.popleft())


def _wait_all(dones: Iterable[Done]) -> None:
    for done in dones:
        done.wait()
