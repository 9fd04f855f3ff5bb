"""The fixed costs of cells, measured by small models in the real executor."""

from __future__ import annotations

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

from flexgen.layout.placement import place_weights
from flexgen.layout.plan import Target, plan_memory
from flexgen.layout.tapes import MIN_TOKENS
from flexgen.memory.homes import Homes
from flexgen.memory.lanes import Lanes
from flexgen.memory.lookup import open_table
from flexgen.memory.machine import Machine
from flexgen.memory.weights import WeightSlots
from flexgen.models import build_layers, open_model
from flexgen.policy import Policy, Share, Tier
from flexgen.probe.effort import Effort
from flexgen.results.trace import Event
from flexgen.runtime.call import Call
from flexgen.runtime.choice import Sampled
from flexgen.runtime.model import Model
from flexgen.runtime.tokens import NewTokens
from flexgen.schedule.steps import Op
from flexgen.units import MIB
from flexgen.workload import Workload

_HIDDEN, _HEAD_DIM, _GROUP, _PROMPT = 64, 16, 2, 16
_RUNS = 3
_COLD_TOKENS = 10
"""The most tokens of a run that empties the caches before each step."""
_CACHES = 64 * MIB
"""Bytes whose reading empties the caches of a processor."""
_LEAST = 1e-7
"""Seconds. Times below are noise; 0 would mean that the device has no tapes."""
_POLICY = Policy(gpu_batch_size=2, num_gpu_batches=2)
_ENCODED = _POLICY.replace(cache={Tier.GPU: Share(100, "int8")})
_ON_HOST = _POLICY.replace(num_gpu_batches=4, cache={Tier.CPU: Share(100)})
"""Attention on the host, with as many batches as its order has in flight."""


class _Took(NamedTuple):
    """Median seconds of the decode of a model.

    each: a pass.
    outside: a pass without its computations, divided by its cells.
    first: the first pass, with the recording of tapes before it.
    attention, mlp: the first batch of a layer's attention, and of its feed-forward half.
    ids: the storing of new ids.
    attend: attention on the host; 0 if there is none.
    """

    each: float
    outside: float
    first: float
    attention: float
    mlp: float
    ids: float
    attend: float = 0.0


def cell_seconds(
    machine: Machine, lanes: Lanes, dtype: torch.dtype, effort: Effort, tapes: bool
) -> dict[str, float]:
    """The seconds of cells (one layer, token and batch), in addition to their kernels, as fields of `Fixed`.

    tapes: whether the device repeats cells from tapes.

    All data is in device memory. Attention and the feed-forward half are separate cells. Attention has rotary
    positions and fewer key heads than query heads, like most families: its cells have many small operations.

    With tapes, the device is a CPU. There the weights of a layer are more than the caches hold. While they pass
    through the caches, the code of a cell and of the executor leaves them, so that it takes two to three times as
    long as otherwise. The kernels of a model with such weights would take much longer than its code, and their time
    changes. So the model is a small one, and the caches are emptied before each step.
    """
    model = _SmallModel(machine, lanes, dtype, effort.layers)
    if not tapes:
        took = model.took(2, effort.tokens)
        mean, share = took.each / model.cells(2), model.attending
        more = min(max(took.attention - took.mlp, 0.0), mean / share)  # the rest is noise
        return {"cell": max(mean - share * more, 0.0), "attention": more}
    caches = _Caches(min(_CACHES, effort.working_set))
    few = min(MIN_TOKENS, effort.tokens)  # runs of few tokens have no tapes
    computed = model.took(1, few, caches)
    encoding = _SmallModel(machine, lanes, dtype, effort.layers, _ENCODED).took(1, few, caches)
    repeated = model.took(2, min(_COLD_TOKENS, effort.tokens), caches)  # each cell by itself
    joined = model.took(1, effort.tokens)  # one call for all layers, which runs no other code
    return {
        "cell": repeated.outside + computed.mlp,
        "attention": max(computed.attention - computed.mlp, 0.0),
        "recorded": max(repeated.outside + (repeated.attention + repeated.mlp) / 2, _LEAST),
        "recording": max(repeated.first - repeated.each, 0.0) / (model.cells(2) - 2),  # not of the embedding
        "joined": max((joined.attention + joined.mlp) / 2, _LEAST),
        "encoded": max(encoding.attention - computed.attention, 0.0),
        "ids": computed.ids,
    }


def host_attention_seconds(
    machine: Machine, lanes: Lanes, dtype: torch.dtype, effort: Effort, cell: float
) -> dict[str, float]:
    """The seconds of cells with attention on the host, in addition to their kernels, as fields of `Fixed`.

    cell: the seconds of a cell without attention.

    The queries of one batch cross the link while the host attends for another one and the device computes a third
    one. If the device computes on the host's cores, all of them compete for these and for Python's lock, so that a
    cell takes several times as long as alone.
    """
    model, batches = _SmallModel(machine, lanes, dtype, effort.layers, _ON_HOST), 4
    took = model.took(batches, effort.tokens)
    found = {"attend": took.attend}
    if machine.device.shares_cores:
        share = model.attending
        found["split"] = max(took.each / model.cells(batches) - (1 - share) * cell, 0.0) / share
    return found


class _Caches:
    """Empties the caches of the processor when it is called. `times`: the beginning and the end of each call."""

    def __init__(self, nbytes: int) -> None:
        self._data = torch.zeros(nbytes // torch.float32.itemsize)
        self.times: list[tuple[float, float]] = []

    def __call__(self) -> None:
        began = time.perf_counter()
        self._data.sum()
        self.times.append((began, time.perf_counter()))


class _SmallModel:
    """A model of random weights in device memory."""

    def __init__(
        self,
        machine: Machine,
        lanes: Lanes,
        dtype: torch.dtype,
        num_layers: int,
        policy: Policy = _POLICY,
    ) -> None:
        from transformers import LlamaConfig  # takes seconds to import, and few processes measure

        heads = _HIDDEN // _HEAD_DIM
        config = LlamaConfig(
            hidden_size=_HIDDEN,
            intermediate_size=4 * _HIDDEN,
            vocab_size=256,
            num_attention_heads=heads,
            num_key_value_heads=heads // _GROUP,
            num_hidden_layers=num_layers,
        )
        spec, checkpoint = open_model(config, "dummy")
        self._layers = layers = build_layers(spec, policy.sep_layer)
        placement = place_weights(layers, policy.weights, dtype)
        workload = Workload(_PROMPT, 1, policy.block_size)
        target = Target(machine.device.topology, workspaces=machine.device.workspaces)
        plan = plan_memory(layers, placement, policy, target, workload)
        homes = Homes(checkpoint, placement, machine)
        homes.load(layers)
        slots = machine.device.topology.choose_order(None, policy, policy.num_gpu_batches).slots
        weights = WeightSlots(layers, homes, plan.weight_slots, placement, machine, slots.decoded)
        table = open_table(layers, homes, machine)
        machine.device.settle()
        self._model = Model(layers, dtype, policy, machine, weights, lanes, slots, None, table)
        self._ids = np.random.default_rng(0).integers(4, spec.vocab_size, size=(policy.block_size, _PROMPT))

    @property
    def attending(self) -> float:
        """The share of the layers that have attention."""
        return sum(layer.has_cache for layer in self._layers) / len(self._layers)

    def cells(self, batches: int) -> int:
        """The cells of a pass."""
        return len(self._layers) * batches

    def took(self, batches: int, tokens: int, before: _Caches | None = None) -> _Took:
        """The times of runs of `tokens` tokens. The first run is not counted. `before`: called before each step."""
        runs = [self._decode(batches, tokens, before) for _ in range(1 + _RUNS)][1:]
        return _Took(
            each=_median(runs, _Decode.passes),
            outside=_median(runs, _Decode.outside),
            first=_median(runs, _Decode.first),
            attention=_median(runs, lambda run: run.computed(True)),
            mlp=_median(runs, lambda run: run.computed(False)),
            ids=_median(runs, lambda run: run.of(Op.STORE_HIDDEN)),
            attend=_median(runs, lambda run: run.of(Op.ATTEND)),
        )

    def _decode(self, batches: int, tokens: int, before: _Caches | None) -> _Decode:
        workload = Workload(_PROMPT, tokens, batches * self._model.policy.gpu_batch_size)
        if before is not None:
            before.times.clear()
        with torch.inference_mode(), (call := Call(self._model, workload, 0, before)), call:
            began = time.perf_counter()  # the times of events are relative to the preparation
            prompts = call.prepare(list(self._ids[: workload.num_prompts]))
            call.run(prompts, tokens, NewTokens(prompts, tokens, Sampled()))
            others = [(start - began, end - began) for start, end in before.times] if before else []
            cached = [layer.has_cache for layer in self._layers]
            return _Decode(list(call.timing.trace.events), cached, others)


class _Decode:
    """The times of the passes of a run after its prefill.

    cached: for each layer, whether it has attention. others: the beginning and the end of all that is not counted.
    """

    def __init__(
        self, events: Sequence[Event], cached: Sequence[bool], others: Sequence[tuple[float, float]] = ()
    ) -> None:
        self._events = events
        self._cached = cached
        self._others = others
        self._ends: dict[int, float] = {}  # by pass
        for event in events:
            op, token, layer, _ = event.step
            if op is Op.STORE_HIDDEN and layer == len(cached) - 1:
                self._ends[token] = max(self._ends.get(token, 0.0), event.end)

    @property
    def _later(self) -> list[int]:
        """The passes after the first one."""
        after = sorted(self._ends)[1:]
        return after[1:] or after

    def _seconds(self, token: int) -> float:
        """The seconds of a pass."""
        begin, end = self._ends[token - 1], self._ends[token]
        return end - begin - sum(after - before for before, after in self._others if begin <= before < end)

    def passes(self) -> list[float]:
        """The seconds of the passes after the first one."""
        return list(map(self._seconds, self._later))

    def first(self) -> list[float]:
        """The seconds of the first pass, and of the recording before it."""
        return [self._seconds(1)] if 1 in self._ends else []

    def outside(self) -> list[float]:
        """The seconds of `passes` in which nothing is computed, divided by the number of cells."""
        busy, cells = defaultdict[int, float](float), Counter[int]()
        for event in self._events:
            busy[event.step.token] += event.end - event.start
            cells[event.step.token] += event.step.op is Op.COMPUTE
        return [max(self._seconds(token) - busy[token], 0.0) / max(cells[token], 1) for token in self._later]

    def computed(self, cached: bool) -> list[float]:
        """The seconds of the first batch in these passes in the layers with attention (`cached`), or in the others,
        except for the embedding and the head."""
        passes = set(self._later)
        return [
            event.end - event.start
            for event in self._events
            if event.step.op is Op.COMPUTE
            and event.step.token in passes
            and event.step.batch == 0
            and 0 < event.step.layer < len(self._cached) - 1
            and self._cached[event.step.layer] == cached
        ]

    def of(self, op: Op) -> list[float]:
        """The seconds of the jobs of an operation, in all passes."""
        return [event.end - event.start for event in self._events if event.step.op is op]


def _median(runs: Sequence[_Decode], values: Callable[[_Decode], Iterable[float]]) -> float:
    """The median over all values of the runs; 0 if there are none."""
    found = list(chain.from_iterable(map(values, runs)))
    return statistics.median(found) if found else 0.0
