"""The fixed costs of cells, measured by small models in the real executor."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, pairwise
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
from flexgen.workload import Workload

_HIDDEN, _HEAD_DIM, _GROUP, _PROMPT = 64, 16, 2, 16
_WIDE_HEAD_DIM = 64
_RUNS = 3
_LEAST = 1e-7
"""Seconds. Times below are noise; 0 would mean that the device has no tapes."""
_POLICY = Policy(gpu_batch_size=2, num_gpu_batches=2)
_ENCODED = _POLICY.replace(cache={Tier.GPU: Share(100, "int8")})
_ON_HOST = _POLICY.replace(num_gpu_batches=4, cache={Tier.CPU: Share(100)})
"""Attention on the host, with as many batches as its order has in flight."""


class _Took(NamedTuple):
    """Median seconds of the decode of a model: of a pass, of a layer's attention, of its feed-forward half, of
    storing new ids, and of attention on the host (0 if there is none)."""

    each: float
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

    With tapes, the device is a CPU. There the weights of a wide model are more than the caches hold. While they pass
    through the caches, the code of a cell leaves them, so that it takes two to three times as long as with a narrow
    model. The time of the kernels is that of the same model in one call for all layers.
    """
    narrow = _SmallModel(machine, lanes, dtype, effort.layers, _HIDDEN)
    if not tapes:  # the kernels of the narrow model take no time
        took = narrow.took(2, effort.tokens)
        more = max(took.attention - took.mlp, 0.0)
        return {"cell": took.each / narrow.cells(2) - more * narrow.attending, "attention": more}
    hidden = max(effort.hidden // 2, _HIDDEN)
    wide = _SmallModel(machine, lanes, dtype, effort.layers, hidden)
    few = min(MIN_TOKENS, effort.tokens)  # runs of few tokens have no tapes
    computed, joined = wide.took(1, few), wide.took(1, effort.tokens)
    mlp = max(computed.mlp - joined.mlp, 0.0)
    encoded = _SmallModel(machine, lanes, dtype, effort.layers, hidden, _ENCODED).took(1, few)
    least = narrow.took(1, effort.tokens)
    recorded = max(narrow.took(2, effort.tokens).each / narrow.cells(2), _LEAST)
    return {
        "cell": recorded + mlp,  # the first is the time of the executor
        "attention": max(computed.attention - joined.attention - mlp, 0.0),
        "recorded": recorded,
        "joined": max((least.attention + least.mlp) / 2, _LEAST),
        "encoded": max(encoded.attention - computed.attention, 0.0),
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
    model, batches = _SmallModel(machine, lanes, dtype, effort.layers, _HIDDEN, _ON_HOST), 4
    took = model.took(batches, effort.tokens)
    found = {"attend": took.attend}
    if machine.device.shares_cores:
        share = model.attending
        found["split"] = max(took.each / model.cells(batches) - (1 - share) * cell, 0.0) / share
    return found


class _SmallModel:
    """A model of random weights in device memory."""

    def __init__(
        self,
        machine: Machine,
        lanes: Lanes,
        dtype: torch.dtype,
        num_layers: int,
        hidden: int,
        policy: Policy = _POLICY,
    ) -> None:
        from transformers import LlamaConfig  # takes seconds to import, and few processes measure

        heads = hidden // (_HEAD_DIM if hidden == _HIDDEN else _WIDE_HEAD_DIM)
        config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            vocab_size=256,
            num_attention_heads=heads,
            num_key_value_heads=max(heads // _GROUP, 1),
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

    def took(self, batches: int, tokens: int) -> _Took:
        """The times of runs of `tokens` tokens, of passes in which nothing is recorded."""
        runs = [self._events(batches, tokens) for _ in range(1 + _RUNS)][1:]
        events = list(chain.from_iterable(runs))
        return _Took(
            statistics.median(chain.from_iterable(map(self._passes, runs))),
            statistics.median(self._computed(events, True)),
            statistics.median(self._computed(events, False)),
            _median(event.end - event.start for event in events if event.step.op is Op.STORE_HIDDEN),
            _median(event.end - event.start for event in events if event.step.op is Op.ATTEND),
        )

    def _events(self, batches: int, tokens: int) -> Sequence[Event]:
        workload = Workload(_PROMPT, tokens, batches * self._model.policy.gpu_batch_size)
        with torch.inference_mode(), (call := Call(self._model, workload, 0)), call:
            prompts = call.prepare(list(self._ids[: workload.num_prompts]))
            call.run(prompts, tokens, NewTokens(prompts, tokens, Sampled()))
            return list(call.timing.trace.events)

    def _passes(self, events: Sequence[Event]) -> list[float]:
        """The seconds of the passes after the one that records."""
        ends: dict[int, float] = {}
        for event in events:
            op, token, layer, _ = event.step
            if op is Op.STORE_HIDDEN and layer == len(self._layers) - 1:
                ends[token] = max(ends.get(token, 0.0), event.end)
        seconds = [after - before for before, after in pairwise(ends[token] for token in sorted(ends))]
        return seconds[1:] or seconds

    def _computed(self, events: Sequence[Event], cached: bool) -> Iterator[float]:
        """The seconds of the cells with attention (`cached`), or of the feed-forward cells, in these passes."""
        for event in events:
            op, token, layer, _ = event.step
            inner = 0 < layer < len(self._layers) - 1
            if op is Op.COMPUTE and token > 1 and inner and self._layers[layer].has_cache == cached:
                yield event.end - event.start


def _median(seconds: Iterable[float]) -> float:
    return statistics.median(found) if (found := list(seconds)) else 0.0
