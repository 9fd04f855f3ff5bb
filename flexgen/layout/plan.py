"""The memory plan: how many bytes each tier must hold, computed once from layers, policy and workload.

The feasibility check, the buffers that are allocated, the report and the cost model all read it, so what was
promised is what is taken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from flexgen.kernels.sparse_attention import most_chosen
from flexgen.kernels.workspaces import HOST, Workspaces, choice_bytes
from flexgen.layout.cache import CacheSegment, cache_segments
from flexgen.layout.needs import MemoryPlan, Need
from flexgen.layout.placement import Placement
from flexgen.layout.rows import lookup_sizes
from flexgen.layout.topology import Topology
from flexgen.layout.weight_slots import decoded_bytes, decodes, decoding_bytes, slot_sizes
from flexgen.models import Layer, ModelSpec
from flexgen.models.layer import AttentionLayer
from flexgen.models.spec import AttentionSpec
from flexgen.orders import Slots
from flexgen.policy import Policy, Tier
from flexgen.quant import head_format
from flexgen.units import BLOCK, MIB, align
from flexgen.workload import Workload

_TWO_OF_EACH = Slots()
SLOTS = _TWO_OF_EACH.cells
"""Buffers of each kind unless an order wants another number: one in use, one on its way."""

_STAGING_BYTES = 16 * MIB
"""Of results on their way to the caller, at most: a copy of this size takes a link far longer than starting it."""


def _choice_bytes(segment: CacheSegment, heads: int) -> int:
    """What choosing in torch takes at most beyond dense attention, at the last token."""
    most = most_chosen(segment.attn_sparsity, segment.choice_tokens, segment.pages * segment.page_tokens)
    # For each: an index of what is best, its position before and after padding, two weights, three flags.
    return len(segment.rows) * heads * most * (3 * torch.int64.itemsize + 2 * torch.float32.itemsize + 3)


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
        cache = {
            rows: _by_tier(attention, policy, rows, workload.capacity, dtype, topology)
            for rows in set(batches)
        }
        for rows in batches:
            needs += _cache_homes(attention, cache[rows], topology)
            needs += _activation_homes(spec, policy, rows, workload, dtype)
        # One set of slots serves every batch: each as large as the batch that needs most of it.
        largest: dict[tuple[Tier, str, str], int] = {}
        for rows, segments in cache.items():
            in_flight = _in_flight(
                layers, attention, segments, policy, rows, workload, dtype, topology, all_logits, slots.cells,
                workspaces,
            )  # fmt: skip
            for key, nbytes in _summed(in_flight):
                largest[key] = max(largest.get(key, 0), nbytes)
        needs += [Need(*key, nbytes) for key, nbytes in largest.items()]
        needs.append(Need(Tier.GPU, "libraries", "workspace", workspaces.fixed))
        positions = max(batches) * workload.prompt_len
        decoded = [
            decoded_bytes(layer, placement)
            for layer in layers
            # Without all logits the head takes one position of each row.
            if decodes(
                max(batches) if layer is layers[-1] and not all_logits else positions,
                dtype,
                topology,
            )
        ]
        needs.append(Need(Tier.GPU, "weights", "workspace", slots.decoded * max(decoded, default=0)))
        if linked:  # without Triton
            needs.append(Need(Tier.GPU, "weights", "workspace", decoding_bytes(layers, placement)))
        lookup = lookup_sizes(layers, placement, topology, positions)
        needs.append(Need(Tier.GPU, "weights", "slots", slots.cells * lookup.slot))
        needs.append(Need(Tier.CPU, "weights", "staging", slots.cells * lookup.staging + lookup.scratch))
        needs.append(Need(Tier.GPU, "weights", "workspace", lookup.decoded))
        if all_logits:
            logits = workload.num_prompts * workload.prompt_len * spec.vocab_size * dtype.itemsize
            needs.append(Need(Tier.CPU, "activations", "home", logits))
            if linked:
                staged = staging_bytes(max(batches), workload.prompt_len, spec.vocab_size, dtype)
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


_ByTier = Sequence[Sequence[CacheSegment]]
"""The cache of a batch: for each tier that has rows the segments of the different kinds of attention."""


def _by_tier(
    attention: Iterable[AttentionSpec],
    policy: Policy,
    rows: int,
    capacity: int,
    dtype: torch.dtype,
    topology: Topology,
) -> _ByTier:
    each = (cache_segments(own.cache, policy, rows, capacity, dtype, topology) for own in attention)
    return list(zip(*each, strict=True))


def _cache_homes(attention: Mapping[AttentionSpec, int], cache: _ByTier, topology: Topology) -> list[Need]:
    """`attention`: how many layers have each kind."""
    needs, counts = [], attention.values()
    for segments in cache:
        tier = segments[0].tier
        home = sum(layers * segment.nbytes for layers, segment in zip(counts, segments, strict=True))
        needs.append(Need(tier, "cache", "home", home))
        if segments[0].on_device and not topology.shares_host_memory:  # one mask serves all layers
            needs.append(Need(Tier.GPU, "cache", "workspace", max(s.mask_bytes() for s in segments)))
        if tier is Tier.DISK:  # the pages that are being filled
            filled = sum(layers * s.page_bytes for layers, s in zip(counts, segments, strict=True))
            needs.append(Need(Tier.CPU, "cache", "staging", filled))
    return needs


def activation_bytes(spec: ModelSpec, rows: int, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of the hidden states of `tokens` tokens of `rows` prompts, in whole disk blocks."""
    return align(rows * tokens * spec.hidden_size * dtype.itemsize, BLOCK)


def staging_bytes(rows: int, positions: int, size: int, dtype: torch.dtype) -> int:
    """Bytes of the buffer through which `size` values for each position of a batch reach the caller."""
    each = size * dtype.itemsize
    return min(max(_STAGING_BYTES, each), rows * positions * each)


def _activation_homes(
    spec: ModelSpec, policy: Policy, rows: int, workload: Workload, dtype: torch.dtype
) -> list[Need]:
    return [
        Need(tier, "activations", "home", activation_bytes(spec, len(part), workload.prompt_len, dtype))
        for tier, part in policy.activations.rows(rows).items()
        if part
    ]


def _in_flight(
    layers: Sequence[Layer],
    attention: Collection[AttentionSpec],
    cache: _ByTier,
    policy: Policy,
    rows: int,
    workload: Workload,
    dtype: torch.dtype,
    topology: Topology,
    all_logits: bool,
    slots: int,
    workspaces: Workspaces,
) -> list[Need]:
    """Slots, staging and workspace while a batch of `rows` is computed."""
    needs = []
    spec, linked = layers[0].spec, not topology.shares_host_memory
    prompt = workload.prompt_len
    asked_of_host = 0
    # A slot serves every layer: it is as large as the layer that needs most.
    for segments in cache:
        tier, on_device = segments[0].tier, segments[0].on_device
        largest = max(segment.nbytes for segment in segments)
        if tier is Tier.DISK:
            needs.append(Need(Tier.CPU, "cache", "slots", slots * largest))
        workspace = max(segment.workspace_bytes(prompt) for segment in segments)
        there = max(segment.device_bytes() for segment in segments) if on_device and linked else 0
        needs.append(Need(Tier.GPU, "cache", "workspace", max(workspace, there)))
        if on_device and not segments[0].resident and linked:
            needs.append(Need(Tier.GPU, "cache", "slots", slots * largest))
        if not on_device:
            asked_of_host += len(segments[0].rows)
        if segments[0].sparse:
            where = Tier.GPU if on_device else Tier.CPU
            choices = (_choice_bytes(s, own.heads) for s, own in zip(segments, attention, strict=True))
            needs.append(Need(where, "cache", "workspace", max(choices)))
        if tier is not Tier.GPU and linked:
            fresh = max(segment.token_bytes(prompt) for segment in segments)
            needs.append(Need(Tier.CPU, "cache", "staging", slots * align(fresh, BLOCK)))
            needs.append(Need(Tier.GPU, "cache", "workspace", slots * fresh))
    if asked_of_host:
        answer = slots * dtype.itemsize * max(own.q_size for own in attention)
        qkv = slots * dtype.itemsize * max(own.q_size + 2 * own.kv_size for own in attention)
        needs.append(Need(Tier.CPU, "cache", "staging", asked_of_host * (qkv + answer)))
        needs.append(Need(Tier.GPU, "cache", "slots", asked_of_host * answer))
        # Between the halves of a layer: its input, queries, keys and values, and those of them that leave.
        between = spec.hidden_size * dtype.itemsize * slots + qkv
        needs.append(Need(Tier.GPU, "cache", "workspace", rows * between + asked_of_host * qkv))
    parts = policy.activations.rows(rows)
    from_disk = activation_bytes(spec, len(parts[Tier.DISK]), prompt, dtype)
    needs.append(Need(Tier.CPU, "activations", "staging", 2 * slots * from_disk))
    if linked:
        moved = activation_bytes(spec, rows - len(parts[Tier.GPU]), prompt, dtype)
        needs.append(Need(Tier.GPU, "activations", "slots", slots * moved))
    hidden = activation_bytes(spec, rows, prompt, dtype)
    # Layers are asked about the prefill and about the last token; the head takes one position of each row.
    steps = [(prompt, prompt), (1, workload.capacity)]
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
    elif linked:  # those of other batches are on their way to host memory meanwhile
        others = min(slots, len(batch_sizes(policy, workload.num_prompts)) - 1)
        workspace += others * logits * prompt
    # A batch that stays is kept as its layer's result, at home. Of others a slot keeps the result until its rows have
    # left, and rows that stay are put together with those that arrive.
    stay = sum(len(part) for tier, part in parts.items() if topology.in_place(tier))
    beside = slots * hidden if stay < rows else 0
    # While rows move together, nothing is computed: what is gathered of a batch takes the place of the workspace.
    gathered = _gathered(cache, workload.capacity, topology)
    needs.append(Need(Tier.GPU, "activations", "workspace", max(workspace + beside, gathered[Tier.GPU])))
    needs.append(Need(Tier.CPU, "cache", "workspace", gathered[Tier.CPU]))
    return needs


def _gathered(cache: _ByTier, capacity: int, topology: Topology) -> dict[Tier, int]:
    """Bytes, on the device and in host memory, while rows move to a batch: its keys and values in one layer, and of
    the page that is copied."""
    taken = {Tier.GPU: 0, Tier.CPU: 0}
    for segments in cache:
        on = Tier.GPU if topology.shares_host_memory or segments[0].tier is Tier.GPU else Tier.CPU
        taken[on] += max(segment.token_bytes(capacity) for segment in segments)
    page = 2 * max(segment.page_bytes for segments in cache for segment in segments)
    return {tier: nbytes and nbytes + page for tier, nbytes in taken.items()}
