"""The work of each step of a schedule, for one block of prompts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial

from flexgen.memory.transfer import Chains, Stage
from flexgen.results.trace import Event, LaneName
from flexgen.runtime.buffers import BlockBuffers
from flexgen.runtime.cell import BoundCell
from flexgen.runtime.layer_runner import LayerRunner
from flexgen.runtime.model import Model
from flexgen.runtime.prefix import SharedPrefix
from flexgen.runtime.prompts import Prompts
from flexgen.runtime.recorded import RecordedCells
from flexgen.runtime.tokens import Output
from flexgen.runtime.weights_ahead import WeightsAhead
from flexgen.schedule.idle import Place
from flexgen.schedule.orders import Order
from flexgen.schedule.steps import Grid, Op, Step, all_steps


class Generation:
    """The state of one block and the work of its steps, for the executor."""

    def __init__(
        self,
        grid: Grid,
        model: Model,
        buffers: BlockBuffers,
        prompts: Prompts,
        output: Output,
        first: int = 0,
    ) -> None:
        """first: the number of the grid's first pass in the call. Earlier tokens are in the cache."""
        self.grid = grid
        self.first = first
        self.following: list[list[int]] | None = None
        """The rows of each batch that continue after a run that has ended early, or [] if none does."""
        self.next = first + grid.tokens
        """The number of the first pass after this run."""
        self.ahead = WeightsAhead()
        """The weights that are loaded. A run that continues another one has those of that run."""
        self._model = model
        self._buffers = buffers
        self._prompts = prompts
        self._output = output
        self._runner = LayerRunner(grid, model, buffers, prompts, output, first)
        self._cells: dict[int, BoundCell] = {}  # the latest cell by slot

    @property
    def can_finish(self) -> bool:
        return self._output.can_finish or (self._computes_only and not self._joined)

    def finished(self, token: int) -> bool:
        number = self.first + token
        if number < 0:
            return False
        if self._output.can_finish or self._output.by_token:
            self.following = self._output.following(number)
        last_of_prompts = number == self._prompts.newest_begins and token + 1 < self.grid.tokens
        if self.following is None and last_of_prompts and self._tapes:
            self.following = self._prompts.batches  # the same rows, in a run that joins cells
        if self.following is None:
            return False
        self.next = number + 1
        return True

    @cached_property
    def idle(self) -> frozenset[Place]:
        included = {Place(Op.COMPUTE, j, 0) for layers in self._joined.values() for j in layers[1:]}
        batches = [k for cells in self._joint.values() for k in cells[1:]]
        included |= {Place(Op.COMPUTE, j, k) for j in range(1, self.grid.layers) for k in batches}
        return self._without_work | included

    def steps(self, order: Order) -> Iterator[Step]:
        """The steps of the order. It may leave out idle ones."""
        if not (self._computes_only or self._joint):
            return order(self.grid)
        # In all orders, the same steps are not idle, and each needs one before it. There are few of them: an order
        # would take longer to yield the others than the loop to issue these.
        head, batches = self.grid.layers - 1, range(self.grid.batches)
        each = [Place(Op.COMPUTE, j, k) for j in range(head) for k in batches]
        each += [Place(op, head, k) for k in batches for op in (Op.COMPUTE, Op.STORE_HIDDEN)]
        each = [place for place in each if place not in self.idle]
        return (Step(op, i, j, k) for i in range(self.grid.tokens) for op, j, k in each)

    @cached_property
    def _joint(self) -> Mapping[int, range]:
        """The cells of a layer that are computed in one call, by the first of them. Embeddings are computed alone."""
        if self.grid.batches == 1 or not self._prompts.by_place or not self._moves_nothing:
            return {}
        if any(map(self._output.wants_hidden, range(self.grid.layers))):
            return {}
        return {cells.start: cells for cells in self._prompts.joint_cells if len(cells) > 1}

    @cached_property
    def _joined(self) -> Mapping[int, range]:
        """The layers whose cells are computed in one call, by the first of them. They are recorded before the run."""
        joined: dict[int, range] = {}
        tapes, first = self._tapes, 0
        if tapes is None or self.first <= self._prompts.newest_begins:
            return joined
        self._runner.record(self._prompts.cell(self.first, 0, 0, self.grid.cell_slot(0, 0, 0)))
        for j in range(self.grid.layers):
            if tapes.joins(j, 0):
                joined[first] = range(first, j + 1)
            else:
                first = j
        if 1 in joined:  # with the embedding, although it has no tape
            joined = {0: range(joined.pop(1).stop), **joined}
        return joined

    @property
    def _tapes(self) -> RecordedCells | None:
        """The tapes of the decode, if those of different cells can be joined."""
        tapes = self._buffers.replays
        if not isinstance(tapes, RecordedCells) or not tapes.pays or self._prompts.guesses is not None:
            return None
        return tapes if self._computes_only else None

    @cached_property
    def _computes_only(self) -> bool:
        """Whether the run has one batch and nothing to do between two of its cells, except for its new ids.

        With several batches, a layer computes all of them while its weights may be in a cache.
        """
        return self.grid.batches == 1 and self._moves_nothing

    @cached_property
    def _moves_nothing(self) -> bool:
        """Whether no data moves in the run, except for new ids."""
        if self.grid.splits_attention:
            return False
        steps, head = all_steps(replace(self.grid, tokens=1)), self.grid.layers - 1
        moves = {Place(op, j, k) for op, _, j, k in steps if op is not Op.COMPUTE} - self._without_work
        return moves == {Place(Op.STORE_HIDDEN, head, k) for k in range(self.grid.batches)}

    @cached_property
    def _without_work(self) -> frozenset[Place]:
        return frozenset(self._find_idle())

    def _find_idle(self) -> Iterator[Place]:
        layers, cache, head = self._model.layers, self._buffers.cache, self.grid.layers - 1
        moves_hidden = [self._buffers.activations.moves(k) for k in range(self.grid.batches)]
        for j, layer in enumerate(layers):
            if not self._model.weights.layouts[j].runs:
                prefix = self._prefix_of(j)
                first = int(prefix is not None and prefix.loads(j))  # the first piece brings the prefix too
                yield from (Place(Op.LOAD_WEIGHTS, j, n) for n in range(first, self.grid.weight_pieces))
            keeps_hidden, cached = j == head or self._output.wants_hidden(j), layer.has_cache
            for k, moves in enumerate(moves_hidden):
                if not (cached and cache.loads(j, k)):
                    yield Place(Op.LOAD_CACHE, j, k)
                if not (cached and cache.stores(j, k)):
                    yield Place(Op.STORE_CACHE, j, k)
                if not (moves if j else self._loads_ids):
                    yield Place(Op.LOAD_HIDDEN, j, k)
                if not (moves or keeps_hidden):
                    yield Place(Op.STORE_HIDDEN, j, k)

    @property
    def _loads_ids(self) -> bool:
        return self._buffers.lookup is not None or not self._model.machine.device.shares_host_memory

    def chains(self, step: Step) -> Chains:
        """The work of a step, or () if no data must move."""
        op, i, j, k = step
        if op is Op.LOAD_WEIGHTS:
            weights, number, pieces = self._model.weights, self.first + i, self.grid.weight_pieces
            slot = weights.turns.slot(number, j)
            if not self.ahead.add(number, j, slot, k, pieces):
                return ()
            chains = weights.chains(j, slot, k, pieces)
            prefix = self._prefix_of(j)
            return chains if prefix is None or k else (*chains, *prefix.load(j, slot))
        cell, last = self._cell(step), j == self.grid.layers - 1
        if not cell.span.new or (last and cell.token < 0):
            return ()  # shorter prompts begin in a later pass, or the head has no new token to compute
        match op:
            case Op.LOAD_CACHE:
                return self._buffers.cache.load(cell) if self._model.layers[j].has_cache else ()
            case Op.LOAD_HIDDEN:
                return self._buffers.activations.load(cell) if j else self._load_ids(cell)
            case Op.STORE_HIDDEN:
                stored = self._output.store(cell) if last else self._buffers.activations.store(cell)
                return stored + self._output.store_hidden(cell)
            case Op.STORE_CACHE:
                return self._buffers.cache.store(cell) if self._model.layers[j].has_cache else ()
            case Op.PROJECT | Op.ATTEND | Op.LOAD_ATTENTION:
                return self._attention(op, cell) if self._splits(cell) else ()
            case _ if layers := self._joined.get(j):
                return ((Stage(LaneName.COMPUTE, partial(self._runner.compute_joined, cell, layers)),),)
            case _ if j and (batches := self._joint.get(k)):
                cells = [self._bind(step._replace(batch=n)) for n in batches]
                return ((Stage(LaneName.COMPUTE, partial(self._runner.compute_joint, cells)),),)
            case _:
                work = self._runner.finish if self._splits(cell) else self._runner.compute
                return ((Stage(LaneName.COMPUTE, partial(work, cell)),),)

    def by_cell(self, events: Iterable[Event]) -> Iterator[Event]:
        """The events of the run, with one event for each of the cells that were computed in one call."""
        for event in events:
            op, number, first, k = event.step
            if op is Op.COMPUTE and first and k in self._joint:
                yield from self._divided(event)
                continue
            if op is not Op.COMPUTE or first not in self._joined:
                yield event
                continue
            layers, end = self._joined[first], event.start
            for j, seconds in zip(layers, self._runner.ends(number, first), strict=True):
                # That of the head also has the choice of the ids.
                start, end = end, event.end if j == layers[-1] else event.start + seconds
                yield Event(Step(op, number, j, k), event.lane, start, end)

    def _divided(self, event: Event) -> Iterator[Event]:
        """The event of joint cells as one for each of them, in proportion to their tokens."""
        cells = self._joint[event.step.batch]
        tokens = [self._prompts.tokens[k] for k in cells]
        each, end = (event.end - event.start) / sum(tokens), event.start
        for k, count in zip(cells, tokens, strict=True):
            start, end = end, event.end if k == cells[-1] else end + each * count
            yield Event(event.step._replace(batch=k), event.lane, start, end)

    def _cell(self, step: Step) -> BoundCell:
        """The cell of a step: one object for all consecutive steps of a cell in its slot."""
        _, i, j, k = step
        slot, number = self.grid.cell_slot(i, j, k), self.first + i
        cell = self._cells.get(slot)
        if cell is None or (cell.number, cell.layer, cell.batch) != (number, j, k):
            cell = self._cells[slot] = self._bind(step)
        return cell

    def _bind(self, step: Step) -> BoundCell:
        _, i, j, k = step
        number = self.first + i
        cell = self._prompts.cell(number, j, k, self.grid.cell_slot(i, j, k))
        if prefix := self._prefix_of(j):
            cell = replace(cell, prefix=prefix.pages(j, self._model.weights.turns.slot(number, j)))
        return cell

    def _prefix_of(self, layer: int) -> SharedPrefix | None:
        """The tokens that all rows share, for a layer with a cache. None if they share none."""
        return self._buffers.prefix if self._model.layers[layer].has_cache else None

    def _load_ids(self, cell: BoundCell) -> Chains:
        """The work that loads the ids of the first layer, and the rows of the table if they are gathered."""
        if self._buffers.lookup is not None:
            return self._buffers.lookup.load(self._prompts.source(cell), cell.slot)
        return () if self._runner.feeds(cell) else self._prompts.load(cell)

    def _splits(self, cell: BoundCell) -> bool:
        """Whether the cell is computed in halves, with attention between them."""
        has_cache = self._model.layers[cell.layer].has_cache
        return self.grid.splits_attention and has_cache and self._buffers.cache.asks_host(cell)

    def _attention(self, op: Op, cell: BoundCell) -> Chains:
        runner, host = self._runner, self._buffers.cache.host
        match op:
            case Op.PROJECT:
                project = Stage(LaneName.COMPUTE, partial(runner.project, cell))
                return ((project, Stage(LaneName.FROM_DEVICE, partial(host.send, cell))),)
            case Op.ATTEND:
                chains: Chains = ((Stage(LaneName.HOST, partial(runner.attend_on_host, cell)),),)
                if self._buffers.cache.asks_device(cell):
                    chains += ((Stage(LaneName.COMPUTE, partial(runner.attend, cell)),),)
                return chains
            case _:
                return ((Stage(LaneName.TO_DEVICE, partial(host.fetch, cell)),),)
