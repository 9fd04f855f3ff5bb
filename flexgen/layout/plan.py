"""The memory plan: how many bytes each tier must hold, computed once from layers, policy and workload.

The feasibility check, the buffers that are allocated, the report and the cost model all read it, so what was
promised is what is taken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from flexgen.kernels.workspaces import HOST, Workspaces, choice_bytes
from flexgen.layout.cache_needs import BatchCache, batch_cache
from flexgen.layout.hidden import activation_bytes, hidden_layout
from flexgen.layout.needs import MemoryPlan, Need
from flexgen.layout.passes import Passes
from flexgen.layout.placement import Placement
from flexgen.layout.rows import lookup_sizes
from flexgen.layout.topology import Topology
from flexgen.layout.weight_slots import decoded_bytes, decodes, decoding_bytes, slot_sizes
from flexgen.models import Layer
from flexgen.models.layer import AttentionLayer
from flexgen.policy import Policy, Tier
from flexgen.quant import head_format
from flexgen.schedule.orders import Slots
from flexgen.workload import Workload

_TWO_OF_EACH = Slots()
SLOTS = _TWO_OF_EACH.cells
"""Buffers of each kind unless an order wants another number: one in use, one on its way."""


def plan_memory(
    layers: Sequence[Layer],
    placement: Placement,
    policy: Policy,
    dtype: torch.dtype,
    topology: Topology,
    workload: Workload | None = None,
    all_logits: bool = False,
    slots: Slots = _TWO_OF_EACH,
    workspaces: Workspaces = HOST,
) -> MemoryPlan:
    """The plan of one call, or of the weights alone without a workload.

    `all_logits`: the head computes every position of the prompt, and the result is kept in host memory.
    `workspaces` are those of the compute device.

    Where the compute device computes in host memory, what a policy puts on the GPU tier takes bytes of the CPU tier.
    Raises PolicyError where a codec of the cache cannot keep heads of the model's size.
    """
    spec, linked = layers[0].spec, not topology.shares_host_memory
    attention = Counter(layer.layer_spec.attention for layer in layers if isinstance(layer, AttentionLayer))
    for tier in Tier:  # refused before weights are loaded
        for each in attention:
            head_format(policy.cache[tier].codec, each.head_dim, dtype)
    sizes = slot_sizes(layers, placement, topology, slots.weights)
    needs = [Need(tier, "weights", "home", count) for tier, count in placement.nbytes.items()]
    needs.append(Need(Tier.GPU, "weights", "slots", sum(sizes.device)))
    needs.append(Need(Tier.CPU, "weights", "staging", sum(sizes.staging)))
    if workload is not None:
        batches = batch_sizes(policy, workload.num_prompts)
        passes = Passes(workload.prompt_len, policy.prefill_chunk)
        cache = {
            rows: batch_cache(attention, policy, rows, workload.capacity, dtype, topology)
            for rows in set(batches)
        }
        for rows in batches:
            needs += cache[rows].homes()
            needs += hidden_layout(spec, policy, rows, dtype, topology).homes(passes.new)
        # One set of slots serves every batch: each as large as the batch that needs most of it.
        largest: dict[tuple[Tier, str, str], int] = {}
        for of_batch in cache.values():
            in_flight = _in_flight(
                layers, of_batch, policy, workload, dtype, all_logits, slots.cells, workspaces
            )
            for key, nbytes in _summed(in_flight):
                largest[key] = max(largest.get(key, 0), nbytes)
        needs += [Need(*key, nbytes) for key, nbytes in largest.items()]
        needs.append(Need(Tier.GPU, "libraries", "workspace", workspaces.fixed))
        positions = max(batches) * passes.new
        decoded = [
            decoded_bytes(layer, placement)
            for layer in layers
            # Without all logits the head takes one position of each row.
            if decodes(
                layer,
                placement,
                max(batches) if layer is layers[-1] and not all_logits else positions,
                topology,
            )
        ]
        needs.append(Need(Tier.GPU, "weights", "workspace", slots.decoded * max(decoded, default=0)))
        if linked:  # without Triton; a product is over when keys and values are encoded
            passing = min(of_batch.passing_bytes(passes) for of_batch in cache.values())
            decoding = max(decoding_bytes(layers, placement) - passing, 0)
            needs.append(Need(Tier.GPU, "weights", "workspace", decoding))
        lookup = lookup_sizes(layers, placement, topology, positions)
        needs.append(Need(Tier.GPU, "weights", "slots", slots.cells * lookup.slot))
        needs.append(Need(Tier.CPU, "weights", "staging", slots.cells * lookup.staging + lookup.scratch))
        needs.append(Need(Tier.GPU, "weights", "workspace", lookup.decoded))
        if all_logits:
            logits = workload.num_prompts * workload.prompt_len * spec.vocab_size * dtype.itemsize
            needs.append(Need(Tier.CPU, "activations", "home", logits))
            if linked:
                most = topology.pieces.result_bytes
                staged = staging_bytes(max(batches), workload.prompt_len, spec.vocab_size, dtype, most)
                needs.append(Need(Tier.CPU, "activations", "staging", slots.cells * staged))
    if not linked:
        needs = [replace(need, tier=Tier.CPU) if need.tier is Tier.GPU else need for need in needs]
    return MemoryPlan(tuple(Need(*key, nbytes) for key, nbytes in _summed(needs)), sizes)


def _summed(needs: Iterable[Need]) -> Iterable[tuple[tuple[Tier, str, str], int]]:
    totals: dict[tuple[Tier, str, str], int] = {}
    for need in needs:
        key = need.tier, need.what, need.role
        totals[key] = totals.get(key, 0) + need.nbytes
    return totals.items()


def batch_sizes(policy: Policy, num_prompts: int) -> list[int]:
    """Rows of each GPU batch of a block; the last batch takes what is left."""
    prompts = min(num_prompts, policy.block_size)
    full, rest = divmod(prompts, policy.gpu_batch_size)
    return [policy.gpu_batch_size] * full + ([rest] if rest else [])


def staging_bytes(rows: int, positions: int, size: int, dtype: torch.dtype, most: int) -> int:
    """Bytes of the buffer through which `size` values for each position of a batch reach the caller.

    `most`: `PieceSizes.result_bytes`, which is exceeded only by a single position.
    """
    each = size * dtype.itemsize
    return min(max(most, each), rows * positions * each)


def _in_flight(
    layers: Sequence[Layer],
    cache: BatchCache,
    policy: Policy,
    workload: Workload,
    dtype: torch.dtype,
    all_logits: bool,
    slots: int,
    workspaces: Workspaces,
) -> list[Need]:
    """Slots, staging and workspace while a batch is computed."""
    spec, rows, prompt = layers[0].spec, cache.rows, workload.prompt_len
    passes = Passes(prompt, policy.prefill_chunk)
    states = hidden_layout(spec, policy, rows, dtype, cache.topology)
    needs = cache.in_flight(passes, slots, states.token_bytes) + states.in_flight(passes.new, slots)
    hidden = activation_bytes(spec, rows, passes.new, dtype)
    # Layers are asked about the prefill, or its last part, and about the last token; the head takes one position of
    # each row.
    steps = [(passes.new, prompt), (1, workload.capacity)]
    workspace = max(
        layer.workspace_bytes(
            rows, 1 if layer is layers[-1] and not all_logits else seq, context, dtype, workspaces
        )
        for layer in layers
        for seq, context in steps
    )
    # Ids are chosen when the head's own workspace is free again, all but the logits.
    logits = rows * spec.vocab_size * dtype.itemsize
    if not all_logits:
        workspace = max(workspace, logits + choice_bytes(rows, spec.vocab_size))
    elif (
        not cache.topology.shares_host_memory
    ):  # those of other batches are on their way to host memory meanwhile
        others = min(slots, len(batch_sizes(policy, workload.num_prompts)) - 1)
        workspace += others * logits * prompt
    # A batch that stays is kept as its layer's result, at home. Of others a slot keeps the result until its rows have
    # left. Where some rows stay, they are copied together with those that arrive.
    moving = (slots + (states.resident > 0)) * hidden if states.resident < rows else 0
    # While rows move together, nothing is computed: what is gathered of a batch takes the place of the workspace.
    gathered = cache.gathered(workload.capacity)
    needs.append(Need(Tier.GPU, "activations", "workspace", max(workspace + moving, gathered[Tier.GPU])))
    needs.append(Need(Tier.CPU, "cache", "workspace", gathered[Tier.CPU]))
    return needs
