"""One call: runs its blocks of prompts one after another, with the same buffers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from flexgen.errors import LaneError
from flexgen.layout.passes import Passes
from flexgen.layout.plan import batch_sizes
from flexgen.layout.prefix import prefix_policy, prefix_slots, prefix_workloads, shared_tokens
from flexgen.layout.weights import count_pieces
from flexgen.memory.taken import run_all
from flexgen.results.report import PlacesUsed, Stage
from flexgen.results.trace import LaneName, Phase, Trace
from flexgen.runtime.buffers import BlockBuffers, Buffers
from flexgen.runtime.choice import Sampled
from flexgen.runtime.executor import execute
from flexgen.runtime.generation import Generation
from flexgen.runtime.lane_alone import LaneAlone
from flexgen.runtime.model import Model
from flexgen.runtime.prefix import SharedPrefix
from flexgen.runtime.prefix_groups import PrefixGroup
from flexgen.runtime.prompts import Prompts
from flexgen.runtime.request import Request
from flexgen.runtime.seating import Seating
from flexgen.runtime.tokens import NewTokens, Output
from flexgen.runtime.weights_ahead import WeightsAhead
from flexgen.schedule.idle import Place
from flexgen.schedule.orders import Order, normal
from flexgen.schedule.steps import Grid, Op, Step
from flexgen.workload import Workload


@dataclass
class Timing:
    """Seconds and events of a call. The prefill of a block ends when the first new token of all its rows is known.
    Passes in which prompts enter while other rows decode also count as prefill.

    `ran`: the number of passes that each block ran after its prompts, fewer than tokens were requested if all of its
    rows stopped earlier, and more if prompts entered.
    `stages`: seconds, new tokens and passes * places of each stage. `counted`: the seconds that are in them.
    `guesses_made`, `guesses_kept`, `put_back`: as in `Report`.
    """

    prefill: float = 0.0
    total: float = 0.0
    trace: Trace = field(default_factory=Trace)
    ran: list[int] = field(default_factory=list)
    guesses_made: int = 0
    guesses_kept: int = 0
    put_back: int = 0
    stages: dict[Stage, tuple[float, int, int]] = field(default_factory=dict)
    counted: float = 0.0

    @property
    def places_used(self) -> dict[Stage, PlacesUsed]:
        """The stages of the call; none if no prompt entered when rows had ended."""
        if len(self.stages) < 2:
            return {}
        return {stage: PlacesUsed(seconds, new / of) for stage, (seconds, new, of) in self.stages.items()}

    def count_run(self, stage: Stage, until: float, new_tokens: int, places: int) -> None:
        """Add a run to its stage. until: the seconds of the call at its end. places: those of all its passes."""
        seconds, new, of = self.stages.get(stage, (0.0, 0, 0))
        self.stages[stage] = seconds + until - self.counted, new + new_tokens, of + places
        self.counted = until

    @property
    def decode(self) -> float:
        return self.total - self.prefill


@dataclass
class PromptCounts:
    """Tokens of the prompts of a call.

    shared: those with which all prompts begin and that are computed once. reused: those that were not computed,
    because they were computed for another prompt. positions_computed: those of all blocks that were computed, with
    the padding of their batches.
    groups: the number of groups of prompts that have begun, each with its own prefix.
    """

    shared: int
    groups: int = 0
    reused: int = 0
    positions_computed: int = 0


PrefixOutput = Callable[[Prompts, int], AbstractContextManager[Output]]
"""Makes the output of the block that computes a part of a prefix, from the ids of the prompt with this number."""


def _first_token(prompts: Prompts, row: int) -> AbstractContextManager[Output]:
    """The output of a prefix whose logits are not needed."""
    return nullcontext(NewTokens(prompts, 1, Sampled()))


class Call:
    """Runs the blocks of one call, one after another.

    For each block, `prepare` its prompts, make an output for them, and `run`. The buffers of the cache and of the
    hidden states are allocated for the first block and reused for all blocks of the same shape.

    check: called before each step. Its exception ends the call and is raised unchanged. Entering the call raises
    RequestError while another call runs, and so does the call if the model is closed while it runs.

    workspace: bytes of the plan for temporaries on the compute device.
    retained: buffers that outlive the call, such as those of a conversation.

    Enter it twice (`with call, call:`). If Ctrl-C interrupts the beginning of the inner exit, the outer exit does its
    work. Otherwise the outer exit does nothing.
    """

    def __init__(
        self,
        model: Model,
        workload: Workload,
        pad_id: int,
        check: Callable[[], object] | None = None,
        workspace: int = 0,
        retained: Buffers | None = None,
    ) -> None:
        self._check = check
        self._workspace = workspace
        self._model = model
        self._workload = workload
        self._pad_id = pad_id
        self._prompts: Prompts | None = None
        self._buffers = retained or Buffers()
        self._retains = retained is not None
        self._undo: list[Callable[[], object]] | None = None
        self._began = 0.0
        self.timing = Timing()
        self.counts = PromptCounts(shared_tokens(workload, model.policy))

    def __enter__(self) -> Call:
        self._model.in_use.begin(self)
        self._model.machine.device.begin_call(self)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._undo is None:
            self._undo = [
                partial(self._model.in_use.end, self),
                partial(self._model.machine.device.end_call, self),
                self._model.weights.release_decoded,
                self._buffers.end_call if self._retains else self._buffers.close,
                self._free_prompts,
                self._free_prefix,
            ]
        run_all(self._undo)

    def order_of(self, batches: int) -> Order:
        """The order for a block of `batches` batches."""
        return self._model.order_of(batches)

    def blocks(
        self,
        request: Request,
        groups: Sequence[PrefixGroup],
        prefix_output: PrefixOutput = _first_token,
        waits: bool = False,
    ) -> Iterator[tuple[list[int], Prompts]]:
        """The numbers of the prompts of each block, prepared, group by group. `begin` computes the prefix of a group.

        waits: whether all prompts of a group are given to one block, where those beyond its size wait until rows have
            ended.
        """
        for group in groups:
            self.begin(group, request, prefix_output)
            own = group.prompts(request)
            for some in own.blocks(len(own.prompts) if waits else self._model.policy.block_size):
                yield [group.rows[n] for n in some], self.prepare([own.prompts[n] for n in some])

    @property
    def prefix(self) -> tuple[SharedPrefix, ...]:
        """The prefix of the present group after each of its parts; () if its prompts share none."""
        return self._buffers.prefix.parts if self._buffers.prefix else ()

    def begin(
        self,
        group: PrefixGroup,
        request: Request,
        output: PrefixOutput = _first_token,
        lanes: Sequence[LaneName] = (),
    ) -> list[dict[LaneName, dict[Phase, float]]]:
        """Compute the prefix of a group, before its first block. `prepare` then gets its prompts without the prefix.

        Parts that the prefix of the group before also has are used again. The others are freed.

        output: makes the outputs of the blocks of one row. lanes: those to time in each of them, as by `time_lane`.
        """
        self._free_prompts()
        self._buffers.close()
        row, prompts = group.rows[0], request.prompts
        for part in reversed(self.prefix):
            ends = tuple(before.length for before in part.parts)
            same = np.array_equal(prompts[part.row][: part.length], prompts[row][: part.length])
            if same and ends == group.ends[: len(ends)]:
                break
            self._buffers.prefix = part.close()
        self._workload = group.workload(request, self._workload.gen_len)
        parts = prefix_workloads(self._workload, self._model.policy)[len(self.prefix) :]
        self.counts.groups += 1
        computed = sum(part.prompt_len - part.prefix for part in parts)
        self.counts.reused += len(group.rows) * group.shared - computed
        return [self._share(part, row, prompts[row], output, lanes) for part in parts]

    def _share(
        self, part: Workload, row: int, prompt: np.ndarray, output: PrefixOutput, lanes: Sequence[LaneName]
    ) -> dict[LaneName, dict[Phase, float]]:
        """Compute the next part of the prefix. `prompt`: that of number `row`, whose ids are used."""
        model, before, ran = self._model, self._buffers.prefix, len(self.timing.ran)
        one = replace(model, policy=prefix_policy(model.policy), slots=prefix_slots(model.slots))
        block = Call(one, part, self._pad_id, self._check, 0)
        block.timing = self.timing
        block._buffers.prefix = before
        try:
            prompts = block.prepare([prompt[part.prefix : part.prompt_len]])
            with output(prompts, row) as received:
                block.run(prompts, 1, received)
                timed = {lane: block.time_lane(lane, prompts, 1, received) for lane in lanes}
            del self.timing.ran[ran:]  # it counts the tokens of prompts only
            self.counts.positions_computed += block.counts.positions_computed
            cache = block._buffers.keep_cache()
            self._buffers.prefix = SharedPrefix(cache, part.prompt_len, before, row)
        finally:
            run_all([block._free_prompts, block._buffers.close, model.machine.device.return_freed])
        return timed

    def prepare(self, prompts: Sequence[np.ndarray], cached: int = 0) -> Prompts:
        """Accept the prompts of the next block. Prompts beyond the policy's block size enter when rows have ended.
        `cached`: the tokens of each row in retained buffers."""
        self._began = time.perf_counter()
        self._free_prompts()
        policy, width = self._model.policy, max(map(len, prompts))
        buffers, batches = self._buffers, batch_sizes(policy, len(prompts))
        buffers.fit(self._model, self._workload, batches, self._workspace)
        shared = buffers.prefix.length if buffers.prefix else 0
        machine, slots = self._model.machine, self._model.slots.cells
        passes = Passes.of(self._workload, policy, machine.device.topology)
        passes = replace(passes, width=width, cached=cached, shared=shared)
        self._prompts = Prompts(prompts, batches, passes, self._pad_id, machine, slots)
        if pool := self._block.pool:
            self._prompts.seating = Seating(pool)
        self._model.machine.device.settle()
        self.counts.positions_computed += self._prompts.prompt_positions
        return self._prompts

    def run(self, prompts: Prompts, tokens: int, output: Output) -> None:
        """Generate `tokens` tokens for the prepared prompts, or fewer if all rows stop. `output` receives the result.

        One run continues as long as the batches are the same. When rows that have stopped leave, the others are
        regrouped, batches of waiting prompts enter, and a new run continues with the next pass. With an output that
        is `by_token`, each token is a run.
        """
        self.timing.counted = self.timing.total
        self.timing.prefill += self._elapsed() - self.timing.total  # the preparation
        if prompts.by_place:
            self._seat(prompts, prompts.batches, prompts.first)
        self._block.expect(tokens)
        generation = self._execute(prompts, tokens, output, prompts.first)
        while generation.following:
            number = generation.next
            if prompts.by_place:
                self._seat(prompts, generation.following, number)
            elif generation.following != prompts.batches:
                if (restarted := prompts.restart(generation.following)) is not None:
                    self.timing.ran.append(number)
                    number = restarted
                    generation.ahead = WeightsAhead()  # that of passes with other numbers
                self._regroup(prompts, generation.following, number)
                self._block.expect(prompts.passes_left(number, tokens))
            generation = self._execute(prompts, tokens, output, number, generation.ahead)
        self.timing.total += time.perf_counter() - self._began
        self.timing.ran.append(generation.next)
        self.timing.put_back += prompts.seating.put_back if prompts.seating else 0
        if prompts.guesses is not None:
            self.timing.guesses_made += prompts.guesses.made
            self.timing.guesses_kept += prompts.guesses.kept

    def _execute(
        self, prompts: Prompts, tokens: int, output: Output, first: int, ahead: WeightsAhead | None = None
    ) -> Generation:
        offset, stage = self._elapsed(), prompts.stage
        made = output.count if isinstance(output, NewTokens) else 0
        order = self._model.order_of(len(prompts.cells))
        passes = max(-first, 0) + 1 if output.by_token else prompts.passes_left(first, tokens)
        run = range(first, first + passes)
        generation = self._generation(prompts, output, self._grid(order, prompts, len(run)), first)
        generation.ahead = ahead or generation.ahead
        steps = self._checked(generation.steps(order), generation.idle)
        trace = execute(steps, generation.grid, generation, self._model.lanes, run)
        events = list(generation.by_cell(trace.events))
        self.timing.trace.extend(events, offset)
        if output.by_token or (output.can_finish and generation.following is None):
            generation.finished(len(run) - 1)
        if prompts.newest_begins >= first:
            head = Op.STORE_HIDDEN, prompts.newest_begins, len(self._model.layers) - 1
            known = [offset + event.end for event in events if event.step[:3] == head]
            self.timing.prefill += max(known, default=self._elapsed()) - offset
        if isinstance(output, NewTokens):
            places = (generation.next - first) * len(prompts.newest)
            self.timing.count_run(stage, self._elapsed(), output.count - made, places)
        return generation

    def _elapsed(self) -> float:
        """Seconds of the call, without those between its blocks."""
        return self.timing.total + time.perf_counter() - self._began

    def _checked(self, steps: Iterable[Step], idle: frozenset[Place]) -> Iterator[Step]:
        """The steps that are not idle, each after a check whether the call ends."""
        in_use = self._model.in_use
        for step in steps:
            op, _, layer, batch = step
            if (op, layer, batch) in idle:
                continue
            in_use.check()
            if self._check is not None:
                self._check()
            yield step

    def _seat(self, prompts: Prompts, batches: list[list[int]], number: int) -> None:
        """Run with these rows in the places of the batches from pass `number` on. No step may be in flight."""
        moved = prompts.seat(batches, number)
        self._block.divide(prompts.cells, moved)

    def _regroup(self, prompts: Prompts, batches: list[list[int]], token: int) -> None:
        """Run only these rows from `token` on. No step may be in flight."""
        try:
            self._block.regroup(self._model, prompts.regroup(batches, token))
        except OSError as error:
            raise LaneError(
                f"moving the cache of {sum(map(len, batches))} rows before token {token} failed: {error}"
            ) from error
        self._model.machine.device.settle()

    def time_lane(self, lane: LaneName, prompts: Prompts, tokens: int, output: Output) -> dict[Phase, float]:
        """Seconds that `lane` is busy in each phase of the prepared block when nothing else runs.

        Runs the whole prefill and at most three later tokens: the first, the middle and the last one. The time of a
        token grows linearly, so the mean of these represents all. The results are meaningless. In every order, host
        attention is timed separately from the device's computation.
        """
        first = prompts.first
        sampled = [*range(first, 1), *(sorted({1, tokens // 2, tokens - 1} - {0}) if tokens > 1 else ())]
        grid = replace(self._grid(normal, prompts, tokens - first), splits_attention=True)
        generation = self._generation(prompts, output, grid, first)
        grid = replace(grid, tokens=len(sampled))
        alone = LaneAlone(generation, lane, [token - first for token in sampled])
        trace = execute(self._checked(normal(grid), alone.idle), grid, alone, self._model.lanes, sampled)
        seconds = dict.fromkeys(sampled, 0.0)
        for event in trace.events:
            seconds[event.step.token] += event.end - event.start
        later = [seconds[token] for token in sampled if token > 0]
        decode = sum(later) / len(later) * (tokens - 1) if later else 0.0
        prefill = sum(seconds[token] for token in sampled if token <= 0)
        return {Phase.PREFILL: prefill, Phase.DECODE: decode}

    def _grid(self, order: Order, prompts: Prompts, tokens: int) -> Grid:
        model, batches = self._model, len(prompts.cells)
        pieces = count_pieces(model.weights.layouts, batches)
        return order.grid(tokens, len(model.layers), batches, pieces, model.slots, model.feeds_ids)

    def _generation(self, prompts: Prompts, output: Output, grid: Grid, first: int = 0) -> Generation:
        return Generation(grid, self._model, self._block, prompts, output, first)

    @property
    def _block(self) -> BlockBuffers:
        assert self._buffers.block is not None, "prepare comes before run"
        return self._buffers.block

    def _free_prefix(self) -> None:
        while self._buffers.prefix is not None:
            self._buffers.prefix = self._buffers.prefix.close()

    def _free_prompts(self) -> None:
        if self._prompts is not None:
            self._prompts.close()
            self._prompts = None
