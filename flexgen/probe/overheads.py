"""What a cell takes beside its arithmetic: a small model runs through the real executor."""

from __future__ import annotations

import statistics

import numpy as np
import torch

from flexgen.layout.placement import place_weights
from flexgen.layout.plan import plan_memory
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
    """Seconds of a cell (a layer, one token, one batch) of a model whose arithmetic and bytes are next to nothing.

    Everything lies in the compute device's memory. Attention and the feed-forward half are cells of their own.
    """
    policy = Policy(gpu_batch_size=2, num_gpu_batches=2)
    from transformers import OPTConfig  # takes seconds, and few processes measure

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
    topology = machine.device.topology
    workload = Workload(_PROMPT, effort.tokens, policy.block_size)
    workspaces = machine.device.workspaces
    plan = plan_memory(layers, placement, policy, dtype, topology, workload, workspaces=workspaces)
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
