"""The memory plan: the bytes that a call needs on each tier, computed once from layers, policy and workload.

The feasibility check, the buffers, the report and the cost model all use it, so that a call allocates exactly the
bytes of its plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from flexgen.errors import PolicyError
from flexgen.kernels.workspaces import HOST, Workspaces, choice_bytes
from flexgen.layout.cache_needs import BatchCache, batch_cache, kinds_of_attention, merging_bytes
from flexgen.layout.cache_pool import cache_pool
from flexgen.layout.graphs import graph_needs, replayed
from flexgen.layout.hidden import HiddenLayout, activation_bytes, hidden_layout
from flexgen.layout.needs import MemoryPlan, Need
from flexgen.layout.passes import Passes
from flexgen.layout.placement import Placement
from flexgen.layout.prefix import prefix_policy, prefix_slots, prefix_workloads
from flexgen.layout.rows import lookup_sizes
from flexgen.layout.topology import Topology
from flexgen.layout.weight_slots import decoded_bytes, decodes, decoding_bytes, slot_sizes
from flexgen.models import Layer, ModelSpec, one_of_each_kind
from flexgen.policy import Policy, Tier
from flexgen.quant import head_format
from flexgen.schedule.orders import Slots
from flexgen.workload import Workload

_TWO_OF_EACH = Slots()
SLOTS = _TWO_OF_EACH.cells
"""The number of buffers of each kind, unless an order needs another number: one in use and one in flight."""


@dataclass(frozen=True)
class Target:
    """The target of a plan: a machine's links, an order's slots, and the workspaces of the compute device."""

    topology: Topology
    slots: Slots = _TWO_OF_EACH
    workspaces: Workspaces = HOST


def plan_memory(
    layers: Sequence[Layer],
    placement: Placement,
    policy: Policy,
    target: Target,
    workload: Workload | None = None,
    all_logits: bool = False,
) -> MemoryPlan:
    """The plan of one call, or without a workload, of the weights only.

    all_logits: whether the head computes every position of the prompt; the results are stored in host memory.

    If the compute device computes in host memory, the GPU tier's part of a policy needs bytes of the CPU tier.
    Raises PolicyError if a codec of the cache cannot store heads of the model's size, or if sparse attention does not
    support the model's scores.
    """
    _check_sparsity(layers, policy)  # raises before weights are loaded, like the formats of heads
    _check_lengths(layers, policy, workload)
    _check_reserve(layers, policy, workload)
    for tier in Tier:
        for attention in kinds_of_attention(layers):
            head_format(policy.cache[tier].codec, attention.head_dim, placement.dtype)
    sizes = slot_sizes(layers, placement, target.topology, target.slots.weights)
    needs = [Need(tier, "weights", "home", count) for tier, count in placement.nbytes.items()]
    needs.append(Need(Tier.GPU, "weights", "slots", sum(sizes.device)))
    needs.append(Need(Tier.CPU, "weights", "staging", sum(sizes.staging)))
    if workload is not None:
        block = _Block(layers, placement, policy, target, workload, all_logits)
        needs += block.needs() if not block.passes.shared else _with_prefix(block)
    if target.topology.shares_host_memory:
        needs = [replace(need, tier=Tier.CPU) if need.tier is Tier.GPU else need for need in needs]
    return MemoryPlan(tuple(Need(*key, nbytes) for key, nbytes in _summed(needs)), sizes)


def _with_prefix(block: _Block) -> list[Need]:
    """The needs of a block that follows the blocks of its prefix. Only the cache of the prefix remains of these.

    The blocks of a prefix decode nothing, so they replay no CUDA graphs.
    """
    target = replace(block.target, slots=prefix_slots(block.target.slots))
    policy, kept = prefix_policy(block.policy), list[Need]()
    totals: dict[tuple[Tier, str, str], int] = {}

    def also(needs: Iterable[Need]) -> None:
        for key, nbytes in _summed([*needs, *kept]):
            totals[key] = max(totals.get(key, 0), nbytes)

    for workload in prefix_workloads(block.workload, block.policy):
        before = replace(block, policy=policy, workload=workload, target=target).needs()
        before = [need for need in before if need.what != "graphs"]
        also(before)
        kept += [need for need in before if need.what == "cache" and need.role != "workspace"]
    also(block.needs())
    return [Need(*key, nbytes) for key, nbytes in totals.items()]


def _check_sparsity(layers: Sequence[Layer], policy: Policy) -> None:
    """Raise PolicyError if a layer without a window has scores from which sparse attention cannot choose."""
    if policy.attn_sparsity == 1:
        return
    for own in kinds_of_attention(layers):
        if own.window is None and not own.scores.plain:
            parts = {"a cap of scores": own.scores.cap, "ALiBi": own.scores.alibi, "sinks": own.scores.sinks}
            names = " and ".join(name for name, value in parts.items() if value)
            raise PolicyError(
                f"attn_sparsity = {policy.attn_sparsity} is not supported for {layers[0].spec.name}, whose attention "
                f"has {names}; set attn_sparsity to 1"
            )


def _check_lengths(layers: Sequence[Layer], policy: Policy, workload: Workload | None) -> None:
    """Raise PolicyError if a pass of the decode with guesses has more tokens than layers compute at once, or if rows
    of different lengths have keys that depend on the length of the text."""
    spec, rows, guess = layers[0].spec, policy.gpu_batch_size, policy.guess
    if not policy.lengths_differ:
        return
    name, value = ("guess", guess) if guess else ("prefill_rows", policy.prefill_rows)
    if rows * (1 + guess) > spec.chunk_tokens:
        raise PolicyError(
            f"{name} is {value} with gpu_batch_size = {rows}: a pass of the decode has up to {rows * (1 + guess)} "
            f"tokens, and {spec.name} computes at most {spec.chunk_tokens} at once; lower one of the two"
        )
    if workload is not None and spec.stretches(workload.capacity):
        raise PolicyError(
            f"{name} is {value} for texts of {workload.capacity} tokens, but the keys of {spec.name} "
            f"change with the length of such a text; set {name} to 0 or shorten the texts"
        )


def _check_reserve(layers: Sequence[Layer], policy: Policy, workload: Workload | None) -> None:
    """Raise PolicyError if rows could be put back whose keys depend on the length of the text."""
    spec = layers[0].spec
    if workload is None or not policy.reserves(workload.gen_len) or not spec.stretches(workload.capacity):
        return
    raise PolicyError(
        f"reserve_new is {policy.reserve_new} for texts of {workload.capacity} tokens, but the keys of {spec.name} "
        "change with the length of such a text, so that rows cannot be computed again; set reserve_new to 0 or "
        "shorten the texts"
    )


@dataclass(frozen=True)
class _Block:
    """One block of a call, and its needs in addition to the homes and slots of the weights."""

    layers: Sequence[Layer]
    placement: Placement
    policy: Policy
    target: Target
    workload: Workload
    all_logits: bool

    @property
    def _spec(self) -> ModelSpec:
        return self.layers[0].spec

    @property
    def _linked(self) -> bool:
        return not self.target.topology.shares_host_memory

    @property
    def passes(self) -> Passes:
        return Passes.of(self.workload, self.policy, self.target.topology)

    @property
    def _capacity(self) -> int:
        """The columns of the cache."""
        return self.passes.capacity(self.workload.gen_len)

    @property
    def _batches(self) -> list[int]:
        return room_sizes(self.policy, self.workload.num_prompts, self.workload.gen_len)

    def needs(self) -> list[Need]:
        kinds, capacity = kinds_of_attention(self.layers), self._capacity
        dtype, topology = self.placement.dtype, self.target.topology
        cache = {
            rows: batch_cache(kinds, self.policy, rows, capacity, dtype, topology)
            for rows in set(self._batches)
        }
        pool = cache_pool(self.layers, self.policy, self._batches, self.workload, dtype, topology)
        needs = pool.needs() if pool else []
        for rows in self._batches:
            needs += cache[rows].homes(pooled=pool is not None)
            needs += self._hidden(rows).homes(self.passes.cells(rows)[0].new)
        if entering := min(self.passes.rows, sum(self._batches)):
            # The prompts of all cells of a pass. A policy with `prefill_rows` keeps their rows on the device.
            (hidden,) = self._hidden(1).homes(self.passes.width)
            needs.append(replace(hidden, nbytes=entering * hidden.nbytes))
        # All batches use the same slots: each slot is as large as the largest batch needs.
        largest: dict[tuple[Tier, str, str], int] = {}
        for of_batch in cache.values():
            for key, nbytes in _summed(self._in_flight(of_batch)):
                largest[key] = max(largest.get(key, 0), nbytes)
        needs += [Need(*key, nbytes) for key, nbytes in largest.items()]
        needs.append(Need(Tier.GPU, "libraries", "workspace", self.target.workspaces.fixed))
        needs += self._decoded(cache.values())
        needs += self._looked_up()
        if not (self.all_logits or self.passes.shared or self.policy.lengths_differ):
            needs += self._graphs([cache[rows] for rows in self._batches])
        return needs + self._logits() if self.all_logits else needs

    def _hidden(self, rows: int) -> HiddenLayout:
        return hidden_layout(self._spec, self.policy, rows, self.placement.dtype, self.target.topology)

    def _graphs(self, batches: Sequence[BatchCache]) -> list[Need]:
        """The needs of replays of decode cells, even in a call with too few tokens for a capture."""
        placement, topology, workspaces = self.placement, self.target.topology, self.target.workspaces
        numbers = replayed(self.layers, placement, self.policy, topology, workspaces)
        layers = [self.layers[j] for j in numbers]
        return graph_needs(layers, batches, self.workload.capacity, placement.dtype, workspaces)

    def _decoded(self, cache: Iterable[BatchCache]) -> Iterator[Need]:
        """The needs of decoded matrices in the model's dtype, and the temporaries of decoding."""
        placement, topology, rows = self.placement, self.target.topology, max(self._batches)
        positions = max(self.passes.positions(rows), self._joint)
        nbytes = [
            decoded_bytes(layer, placement)
            for layer in self.layers
            # Without all logits, the head computes one position of each row.
            if decodes(
                layer,
                placement,
                rows * self.passes.decoded if layer is self.layers[-1] and not self.all_logits else positions,
                topology,
            )
        ]
        yield Need(Tier.GPU, "weights", "workspace", self.target.slots.decoded * max(nbytes, default=0))
        if self._linked:  # without Triton; a product has ended before keys and values are encoded
            passing = min(of_batch.passing_bytes(self.passes) for of_batch in cache)
            decoding = max(decoding_bytes(self.layers, placement) - passing, 0)
            yield Need(Tier.GPU, "weights", "workspace", decoding)

    def _looked_up(self) -> Iterator[Need]:
        """The needs of the rows of the embedding table."""
        positions, cells = self.passes.positions(max(self._batches)), self.target.slots.cells
        lookup = lookup_sizes(self.layers, self.placement, self.target.topology, positions)
        yield Need(Tier.GPU, "weights", "slots", cells * lookup.slot)
        yield Need(Tier.CPU, "weights", "staging", cells * lookup.staging + lookup.scratch)
        yield Need(Tier.GPU, "weights", "workspace", lookup.decoded)

    @property
    def _joint(self) -> int:
        """The maximum number of tokens of several cells that one call computes; 0 if each is computed alone."""
        seats, passes = sum(self._batches), self.passes
        return min(passes.joint_tokens, seats * passes.decoded + min(passes.rows, seats) * passes.width)

    def _logits(self) -> list[Need]:
        """The needs of the logits of every position, which are stored in host memory."""
        workload, size, dtype = self.workload, self._spec.vocab_size, self.placement.dtype
        positions = workload.num_prompts * workload.prompt_len
        needs = [Need(Tier.CPU, "activations", "home", positions * size * dtype.itemsize)]
        if self._linked:
            most = self.target.topology.pieces.result_bytes
            staged = staging_bytes(max(self._batches), workload.prompt_len, size, dtype, most)
            needs.append(Need(Tier.CPU, "activations", "staging", self.target.slots.cells * staged))
        return needs

    def _in_flight(self, cache: BatchCache) -> list[Need]:
        """The slots, staging and workspace of a batch in computation."""
        rows, passes, slots = cache.rows, self.passes, self.target.slots.cells
        states = self._hidden(rows)
        needs = cache.in_flight(passes, slots, states.token_bytes) + states.in_flight(passes.new, slots)
        hidden = activation_bytes(self._spec, rows, passes.new, self.placement.dtype)
        # The result of a layer is the home of a batch that stays on the device. For other batches, a slot keeps the
        # result until its rows have left. If some rows stay, they are copied together with those that arrive.
        moving = (slots + (states.resident > 0)) * hidden if states.resident < rows else 0
        # During compaction nothing is computed, so the gathered rows of a batch use the memory of the workspace. Rows
        # in whose places prompts enter never move.
        gathered = dict.fromkeys(Tier, 0) if passes.rows else cache.gathered(self._capacity)
        workspace = self._workspace(rows)
        needs.append(Need(Tier.GPU, "activations", "workspace", max(workspace + moving, gathered[Tier.GPU])))
        needs.append(Need(Tier.CPU, "cache", "workspace", gathered[Tier.CPU]))
        if shared := self.passes.shared:
            tokens = min(passes.positions(rows), max(self._spec.chunk_tokens, rows))
            merging = max(merging_bytes(own, tokens, shared) for own in cache.kinds)
            needs.append(Need(Tier.GPU, "cache", "workspace", merging))
        return needs

    def _workspace(self, rows: int) -> int:
        """Bytes of the temporaries to compute a batch of `rows` rows and to choose its ids."""
        dtype, workload = self.placement.dtype, self.workload
        decoded = self.passes.decoded
        # Layers need the most for the prefill, or its last part, or for the last token. The head computes one
        # position of each row, and those of its guesses.
        prompts = self.passes.cells(rows)[-1]
        steps = [(*prompts, workload.prompt_len), (rows, 1, workload.capacity)]
        if self.passes.guess:
            steps.append((rows, decoded, workload.capacity + self.passes.guess))
        if self.passes.longest:
            steps.append((*prompts, workload.capacity))
        if self._joint:  # attention is computed cell by cell
            steps.append((1, self._joint, self._joint))
        workspace = max(
            layer.workspace_bytes(
                some,
                decoded if layer is self.layers[-1] and not self.all_logits else new,
                context,
                dtype,
                self.target.workspaces,
            )
            for layer in one_of_each_kind(self.layers)
            for some, new, context in steps
        )
        workspace += activation_bytes(self._spec, 1, self._joint, dtype)  # their hidden states as one tensor
        # Ids are chosen when the head's workspace, except the logits, is free again. With guesses, those of one token
        # of each row are copied.
        logits = rows * self._spec.vocab_size * dtype.itemsize
        if not self.all_logits:
            together = decoded + bool(self.passes.guess)
            return max(workspace, logits * together + choice_bytes(rows, self._spec.vocab_size))
        if self._linked:  # meanwhile, logits of other batches are in flight to host memory
            others = min(self.target.slots.cells, len(self._batches) - 1)
            workspace += others * logits * workload.prompt_len
        return workspace


def _summed(needs: Iterable[Need]) -> Iterable[tuple[tuple[Tier, str, str], int]]:
    totals: dict[tuple[Tier, str, str], int] = {}
    for need in needs:
        key = need.tier, need.what, need.role
        totals[key] = totals.get(key, 0) + need.nbytes
    return totals.items()


def batch_sizes(policy: Policy, num_prompts: int) -> list[int]:
    """The rows of each GPU batch of a block; the last batch has the remaining rows."""
    prompts = min(num_prompts, policy.block_size)
    full, rest = divmod(prompts, policy.gpu_batch_size)
    return [policy.gpu_batch_size] * full + ([rest] if rest else [])


def room_sizes(policy: Policy, num_prompts: int, gen_len: int) -> list[int]:
    """The rows for which each batch of a block has room: those of `batch_sizes`. If rows may be put back to wait, all
    have the same room, because these rows enter again in any of them."""
    sizes = batch_sizes(policy, num_prompts)
    return sizes[:1] * len(sizes) if policy.reserves(gen_len) else sizes


def staging_bytes(rows: int, positions: int, size: int, dtype: torch.dtype, most: int) -> int:
    """Bytes of the staging buffer for results of a batch with `size` values per position.

    most: `PieceSizes.result_bytes`. Only a single position that is larger exceeds it.
    """
    each = size * dtype.itemsize
    return min(max(most, each), rows * positions * each)
