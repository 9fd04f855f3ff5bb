"""The fixed costs of cells, measured by a small model in the real executor."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np
import torch

from flexgen.layout.placement import place_weights
from flexgen.layout.plan import Target, plan_memory
from flexgen.memory.homes import Homes
from flexgen.memory.lanes import Lanes
from flexgen.memory.lookup import open_table
from flexgen.memory.machine import Machine
from flexgen.memory.weights import WeightSlots
from flexgen.models import build_layers, open_model
from flexgen.policy import Policy
from flexgen.probe.effort import Effort
from flexgen.results.trace import Event
from flexgen.runtime.call import Call
from flexgen.runtime.choice import Sampled
from flexgen.runtime.model import Model
from flexgen.runtime.tokens import NewTokens
from flexgen.schedule.orders import Slots
from flexgen.schedule.steps import Op
from flexgen.workload import Workload

_HIDDEN, _HEADS, _KV_HEADS, _PROMPT = 64, 4, 2, 16
_RUNS = 3


def cell_seconds(machine: Machine, lanes: Lanes, dtype: torch.dtype, effort: Effort) -> tuple[float, float]:
    """The seconds of a cell (one layer, token and batch) of a model with negligible arithmetic and bytes, and the
    additional seconds of a cell with attention.

    All data is in device memory. Attention and the feed-forward half are separate cells. Attention has rotary
    positions and fewer key heads than query heads, like most families: its cells have many small operations.
    """
    policy = Policy(gpu_batch_size=2, num_gpu_batches=2)
    from transformers import LlamaConfig  # takes seconds to import, and few processes measure

    config = LlamaConfig(
        hidden_size=_HIDDEN,
        intermediate_size=4 * _HIDDEN,
        vocab_size=256,
        num_attention_heads=_HEADS,
        num_key_value_heads=_KV_HEADS,
        num_hidden_layers=effort.layers,
    )
    spec, checkpoint = open_model(config, "dummy")
    layers = build_layers(spec, policy.sep_layer)
    placement = place_weights(layers, policy.weights, dtype)
    workload = Workload(_PROMPT, effort.tokens, policy.block_size)
    target = Target(machine.device.topology, workspaces=machine.device.workspaces)
    plan = plan_memory(layers, placement, policy, target, workload)
    homes = Homes(checkpoint, placement, dtype, machine)
    homes.load(layers)
    slots = Slots()
    weights = WeightSlots(layers, homes, plan.weight_slots, placement, machine, slots.decoded)
    table = open_table(layers, homes, machine)
    machine.device.settle()
    model = Model(layers, dtype, policy, machine, weights, lanes, slots, None, table)
    ids = np.random.default_rng(0).integers(4, spec.vocab_size, size=(policy.block_size, _PROMPT))
    cells = (effort.tokens - 1) * len(layers) * policy.num_gpu_batches
    attending = [layer.has_cache for layer in layers]
    took, more = [], []
    with torch.inference_mode():
        for _ in range(1 + _RUNS):
            with (call := Call(model, workload, 0)), call:
                prompts = call.prepare(list(ids))
                output = NewTokens(prompts, effort.tokens, Sampled())
                call.run(prompts, effort.tokens, output)
                took.append(call.timing.decode / cells)
                more.append(_more_for_attention(call.timing.trace.events, attending))
    attention = statistics.median(more[1:])
    return statistics.median(took[1:]) - attention * sum(attending) / len(attending), attention


def _more_for_attention(events: Sequence[Event], attending: Sequence[bool]) -> float:
    """The mean seconds of the computation of the decode's cells with attention, minus those of the feed-forward
    cells. At least 0.

    attending: by layer, whether it has attention. The first and the last layer are neither.
    """
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for event in events:
        step = event.step
        if step.op is Op.COMPUTE and step.token > 0 and 0 < step.layer < len(attending) - 1:
            seconds[attending[step.layer]].append(event.end - event.start)
    if not all(seconds.values()):
        return 0.0
    return max(statistics.mean(seconds[True]) - statistics.mean(seconds[False]), 0.0)
