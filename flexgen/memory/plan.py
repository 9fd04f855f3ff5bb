"""The memory plan: how many bytes each tier must hold, computed once from layers, policy and workload.

The feasibility check, the buffers that are allocated, the report and the cost model all read it, so what was
promised is what is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from flexgen.kernels.attention import MASK_ALIGNMENT, join_bytes
from flexgen.kernels.heads import HeadFormat
from flexgen.kernels.sparse_attention import most_chosen
from flexgen.kernels.workspaces import HOST, Workspaces, choice_bytes
from flexgen.memory.disk import BLOCK
from flexgen.memory.lookup import lookup_sizes
from flexgen.memory.needs import MemoryPlan, Need
from flexgen.memory.placement import Placement
from flexgen.memory.weight_slots import decoded_bytes, decodes, decoding_bytes, slot_sizes
from flexgen.models import Layer, ModelSpec
from flexgen.orders import ORDERS, Order, Slots, order_for
from flexgen.policy import Policy, Tier
from flexgen.quant import head_format
from flexgen.units import KIB, MIB, align
from flexgen.workload import Workload

_TWO_OF_EACH = Slots()
SLOTS = _TWO_OF_EACH.cells
"""Buffers of each kind unless an order wants another number: one in use, one on its way."""

_MEMORY_PAGE_TOKENS = 128
"""Of what moves, as far as it is filled, and of what the compiled kernels of the CPU attend to."""
_DISK_PAGE_TOKENS = 16, 128
_DISK_PAGE_BYTES = 1 * MIB

_STAGING_BYTES = 16 * MIB
"""Of results on their way to the caller, at most: a copy of this size takes a link far longer than starting it."""

_CHOICE_BYTES = 16 * KIB
"""Values that sparse attention reads from disk at once, of one row and K/V head, at least. A disk serves reads of
one block at a small part of the rate of long ones: to skip what lies between them would gain nothing."""
_CHOICE_TOKENS = 128  # at most, unless not even that makes whole blocks


@dataclass(frozen=True)
class CacheSegment:
    """The KV cache of some rows of one batch in one layer: pages of (2, rows, kv_heads, tokens, heads.width).

    A page is contiguous, whatever part of it is filled: it is attended where it lies, and it moves as one
    block. `on_device`: attended by the compute device, otherwise by the host. `resident`: it lives where it
    is attended, so that it never moves. `dtype` is that of the computation, `codec` names what keeps the heads.
    `attn_sparsity`: the share of the cached values that a decode step uses, chosen in blocks of `choice_tokens`; on
    disk these are whole disk blocks.
    """

    tier: Tier
    rows: range
    on_device: bool
    resident: bool
    pages: int
    page_tokens: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    codec: str = "none"
    attn_sparsity: float = 1.0
    choice_tokens: int = 1

    @cached_property
    def heads(self) -> HeadFormat:
        """How a head's key or value lies in a page."""
        return head_format(self.codec, self.head_dim, self.dtype)

    @property
    def sparse(self) -> bool:
        return self.attn_sparsity < 1

    @property
    def page_shape(self) -> tuple[int, int, int, int, int]:
        """Of elements of `heads.dtype`."""
        return 2, len(self.rows), self.kv_heads, self.page_tokens, self.heads.width

    @property
    def page_bytes(self) -> int:
        """Bytes from one page to the next: whole disk blocks."""
        return align(self.token_bytes(self.page_tokens), BLOCK)

    @property
    def nbytes(self) -> int:
        return self.pages * self.page_bytes

    def token_bytes(self, tokens: int) -> int:
        """Bytes of keys and values of `tokens` tokens of all rows as they are kept, without padding."""
        return 2 * len(self.rows) * self.kv_heads * tokens * self.heads.nbytes

    def workspace_bytes(self, prompt_len: int) -> int:
        """What encoding a prompt takes meanwhile, and decoding a page on the CPU."""
        heads = len(self.rows) * self.kv_heads
        return self.heads.workspace_bytes(heads, max(prompt_len, self.page_tokens))

    def device_bytes(self) -> int:
        """What a GPU takes to attend: pages in one, and decoded."""
        rows, tokens = len(self.rows), self.pages * self.page_tokens
        joined = 0
        if self.pages > 1:
            nbytes = self.token_bytes(tokens)
            joined = nbytes if self.sparse else join_bytes(rows, nbytes)
        return joined + self.heads.decode_bytes(rows * self.kv_heads, tokens, self.dtype)

    def mask_bytes(self) -> int:
        """Of the padding mask that a GPU keeps."""
        tokens = align(self.pages * self.page_tokens, MASK_ALIGNMENT)
        return len(self.rows) * tokens * self.dtype.itemsize


def host_attends(policy: Policy, shares_host_memory: bool) -> bool:
    """Whether the policy has rows that the host attends, beside a compute device with memory of its own."""
    return not shares_host_memory and policy.attend_on == "cpu" and policy.cache.percent(Tier.GPU) < 100


def choose_order(name: str | None, policy: Policy, shares_host_memory: bool, batches: int) -> Order:
    """The order of that name, or without one that which the policy asks for of so many batches."""
    attends = host_attends(policy, shares_host_memory)
    return ORDERS[name or order_for(policy.overlap, batches, attends)]


def cache_segments(
    spec: ModelSpec, policy: Policy, rows: int, capacity: int, dtype: torch.dtype, shares_host_memory: bool
) -> tuple[CacheSegment, ...]:
    """How a batch of `rows` prompts keeps `capacity` tokens each, one segment for each tier that has rows."""
    segments = []
    for tier, part in policy.cache.rows(rows).items():
        if not part:
            continue
        on_device = tier is Tier.GPU or not host_attends(policy, shares_host_memory)
        resident = tier is Tier.GPU or (tier is Tier.CPU and (shares_host_memory or not on_device))
        codec = policy.cache[tier].codec
        page_tokens = _MEMORY_PAGE_TOKENS
        if tier is Tier.GPU and not shares_host_memory:
            page_tokens = capacity  # it never moves, and a GPU attends to all of it at once
        if tier is Tier.DISK:
            token = 2 * len(part) * spec.num_kv_heads * head_format(codec, spec.head_dim, dtype).nbytes
            least, most = _DISK_PAGE_TOKENS
            page_tokens = min(max(-(-_DISK_PAGE_BYTES // token), least), most)
        pages = -(-capacity // page_tokens)
        page_tokens = -(-capacity // pages)  # even pages: none is mostly empty
        choice = 1
        if tier is Tier.DISK and policy.attn_sparsity < 1:
            choice = choice_tokens(spec.head_dim * dtype.itemsize)
            page_tokens = align(page_tokens, choice)
            pages = -(-capacity // page_tokens)
        shape = pages, page_tokens, spec.num_kv_heads, spec.head_dim
        segments.append(
            CacheSegment(tier, part, on_device, resident, *shape, dtype, codec, policy.attn_sparsity, choice)
        )
    return tuple(segments)


def choice_tokens(token_bytes: int) -> int:
    """Tokens that are read from disk together, where one takes `token_bytes` in a head: whole disk blocks."""
    whole = BLOCK // math.gcd(BLOCK, token_bytes)
    wanted = -(-_CHOICE_BYTES // (whole * token_bytes))
    return whole * max(min(wanted, _CHOICE_TOKENS // whole), 1)


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
    shares_host_memory: bool,
    workload: Workload | None = None,
    all_logits: bool = False,
    slots: Slots = _TWO_OF_EACH,
    workspaces: Workspaces = HOST,
) -> MemoryPlan:
    """The plan of one call, or of the weights alone without a workload.

    `all_logits`: the head computes every position of the prompt, and the result is kept in host memory.
    `workspaces` are those of the compute device.

    Where the compute device shares host memory, what a policy puts on the GPU tier takes bytes of the CPU tier.
    Raises PolicyError where a codec of the cache cannot keep heads of the model's size.
    """
    spec = layers[0].spec
    for tier in Tier:  # refused before weights are loaded
        head_format(policy.cache[tier].codec, spec.head_dim, dtype)
    sizes = slot_sizes(layers, placement, shares_host_memory, slots.weights)
    needs = [Need(tier, "weights", "home", count) for tier, count in placement.nbytes.items()]
    needs.append(Need(Tier.GPU, "weights", "slots", sum(sizes.device)))
    needs.append(Need(Tier.CPU, "weights", "staging", sum(sizes.staging)))
    if workload is not None:
        batches = batch_sizes(policy, workload.num_prompts)
        for rows in batches:
            needs += _cache_homes(layers, spec, policy, rows, workload, dtype, shares_host_memory)
            needs += _activation_homes(spec, policy, rows, workload, dtype)
        # One set of slots serves every batch: each as large as the batch that needs most of it.
        largest: dict[tuple[Tier, str, str], int] = {}
        for rows in set(batches):
            in_flight = _in_flight(
                layers, policy, rows, workload, dtype, shares_host_memory, all_logits, slots.cells, workspaces
            )
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
                shares_host_memory,
            )
        ]
        needs.append(Need(Tier.GPU, "weights", "workspace", slots.decoded * max(decoded, default=0)))
        if not shares_host_memory:  # without Triton
            needs.append(Need(Tier.GPU, "weights", "workspace", decoding_bytes(layers, placement)))
        lookup = lookup_sizes(layers, placement, shares_host_memory, positions)
        needs.append(Need(Tier.GPU, "weights", "slots", slots.cells * lookup.slot))
        needs.append(Need(Tier.CPU, "weights", "staging", slots.cells * lookup.staging + lookup.scratch))
        needs.append(Need(Tier.GPU, "weights", "workspace", lookup.decoded))
        if all_logits:
            logits = workload.num_prompts * workload.prompt_len * spec.vocab_size * dtype.itemsize
            needs.append(Need(Tier.CPU, "activations", "home", logits))
            if not shares_host_memory:
                staged = staging_bytes(max(batches), workload.prompt_len, spec.vocab_size, dtype)
                needs.append(Need(Tier.CPU, "activations", "staging", slots.cells * staged))
    if shares_host_memory:
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


def _cache_homes(
    layers: Sequence[Layer],
    spec: ModelSpec,
    policy: Policy,
    rows: int,
    workload: Workload,
    dtype: torch.dtype,
    shared: bool,
) -> list[Need]:
    cached = sum(layer.has_cache for layer in layers)
    needs = []
    for segment in cache_segments(spec, policy, rows, workload.capacity, dtype, shared):
        needs.append(Need(segment.tier, "cache", "home", cached * segment.nbytes))
        if segment.on_device and not shared:
            needs.append(Need(Tier.GPU, "cache", "workspace", segment.mask_bytes()))
        if segment.tier is Tier.DISK:  # the page that is being filled
            needs.append(Need(Tier.CPU, "cache", "staging", cached * segment.page_bytes))
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
    policy: Policy,
    rows: int,
    workload: Workload,
    dtype: torch.dtype,
    shared: bool,
    all_logits: bool,
    slots: int,
    workspaces: Workspaces,
) -> list[Need]:
    """Slots, staging and workspace while a batch of `rows` is computed."""
    needs = []
    spec = layers[0].spec
    prompt = workload.prompt_len
    asked_of_host = 0
    for segment in cache_segments(spec, policy, rows, workload.capacity, dtype, shared):
        if segment.tier is Tier.DISK:
            needs.append(Need(Tier.CPU, "cache", "slots", slots * segment.nbytes))
        there = segment.device_bytes() if segment.on_device and not shared else 0
        needs.append(Need(Tier.GPU, "cache", "workspace", max(segment.workspace_bytes(prompt), there)))
        if segment.on_device and not segment.resident and not shared:
            needs.append(Need(Tier.GPU, "cache", "slots", slots * segment.nbytes))
        if not segment.on_device:
            asked_of_host += len(segment.rows)
        if segment.sparse:
            where = Tier.GPU if segment.on_device else Tier.CPU
            needs.append(Need(where, "cache", "workspace", _choice_bytes(segment, spec.num_heads)))
        if segment.tier is not Tier.GPU and not shared:
            fresh = segment.token_bytes(prompt)
            needs.append(Need(Tier.CPU, "cache", "staging", slots * align(fresh, BLOCK)))
            needs.append(Need(Tier.GPU, "cache", "workspace", slots * fresh))
    if asked_of_host:
        answer, kv = (slots * size * dtype.itemsize for size in (spec.q_size, spec.kv_size))
        qkv = answer + 2 * kv
        needs.append(Need(Tier.CPU, "cache", "staging", asked_of_host * (qkv + answer)))
        needs.append(Need(Tier.GPU, "cache", "slots", asked_of_host * answer))
        # Between the halves of a layer: its input, queries, keys and values, and those of them that leave.
        between = spec.hidden_size * dtype.itemsize * slots + qkv
        needs.append(Need(Tier.GPU, "cache", "workspace", rows * between + asked_of_host * qkv))
    parts = policy.activations.rows(rows)
    from_disk = activation_bytes(spec, len(parts[Tier.DISK]), prompt, dtype)
    needs.append(Need(Tier.CPU, "activations", "staging", 2 * slots * from_disk))
    if not shared:
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
    elif not shared:  # those of other batches are on their way to host memory meanwhile
        others = min(slots, len(batch_sizes(policy, workload.num_prompts)) - 1)
        workspace += others * logits * prompt
    # A batch that stays is kept as its layer's result, at home. Of others a slot keeps the result until its rows have
    # left, and rows that stay are put together with those that arrive.
    stay = len(parts[Tier.GPU]) + (len(parts[Tier.CPU]) if shared else 0)
    beside = slots * hidden if stay < rows else 0
    # While rows move together, nothing is computed: what is gathered of a batch takes the place of the workspace.
    gathered = _gathered(spec, policy, rows, workload, dtype, shared)
    needs.append(Need(Tier.GPU, "activations", "workspace", max(workspace + beside, gathered[Tier.GPU])))
    needs.append(Need(Tier.CPU, "cache", "workspace", gathered[Tier.CPU]))
    return needs


def _gathered(
    spec: ModelSpec, policy: Policy, rows: int, workload: Workload, dtype: torch.dtype, shared: bool
) -> dict[Tier, int]:
    """Bytes, on the device and in host memory, while rows move to a batch of `rows`: its keys and values in one
    layer, and of the page that is copied."""
    segments = cache_segments(spec, policy, rows, workload.capacity, dtype, shared)
    taken = {Tier.GPU: 0, Tier.CPU: 0}
    for segment in segments:
        on = Tier.GPU if shared or segment.tier is Tier.GPU else Tier.CPU
        taken[on] += segment.token_bytes(workload.capacity)
    page = 2 * max(segment.page_bytes for segment in segments)
    return {tier: nbytes and nbytes + page for tier, nbytes in taken.items()}
