"""The fixed cost of a cell, measured by a small model in the real executor."""

from __future__ import annotations

import statistics

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
from flexgen.runtime.call import Call
from flexgen.runtime.choice import Sampled
from flexgen.runtime.model import Model
from flexgen.runtime.tokens import NewTokens
from flexgen.schedule.orders import Slots
from flexgen.workload import Workload

_HIDDEN, _HEADS, _PROMPT = 64, 2, 16
_RUNS = 3


def cell_seconds(machine: Machine, lanes: Lanes, dtype: torch.dtype, effort: Effort) -> float:
    """The seconds of a cell (one layer, token and batch) of a model with negligible arithmetic and bytes.

    All data is in device memory. Attention and the feed-forward half are separate cells.
    """
    policy = Policy(gpu_batch_size=2, num_gpu_batches=2)
    from transformers import OPTConfig  # takes seconds to import, and few processes measure

    config = OPTConfig(
        hidden_size=_HIDDEN,
        word_embed_proj_dim=_HIDDEN,
        ffn_dim=4 * _HIDDEN,
        vocab_size=256,
        num_attention_heads=_HEADS,
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
    took = []
    with torch.inference_mode():
        for _ in range(1 + _RUNS):
            with (call := Call(model, workload, 0)), call:
                prompts = call.prepare(list(ids))
                output = NewTokens(prompts, effort.tokens, Sampled())
                call.run(prompts, effort.tokens, output)
                took.append(call.timing.decode / cells)
    return statistics.median(took[1:])
