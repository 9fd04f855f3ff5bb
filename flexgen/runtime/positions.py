"""What a forward pass keeps of every position: logits, and the hidden states behind each transformer layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from flexgen.memory.device import ComputeDevice
from flexgen.memory.needs import Need
from flexgen.memory.plan import activation_bytes, batch_sizes
from flexgen.memory.transfer import Chains, Stage
from flexgen.models import Layer
from flexgen.models.layer import AttentionLayer
from flexgen.models.mlp import MLP
from flexgen.policy import Policy, Tier
from flexgen.runtime.request import Request
from flexgen.runtime.tokens import Prompts
from flexgen.trace import LaneName


class _Kept:
    """Values of one kind on their way from a block's batches to `target` (prompts of the call, width, size)."""

    def __init__(
        self, target: Tensor, prompts: Prompts, places: Sequence[tuple[int, slice]], device: ComputeDevice
    ) -> None:
        """`places`: of each row of the block, its number in `target` and its columns there."""
        self._target = target
        self._prompts = prompts
        self._places = places
        self._device = device
        self._there: dict[int, Tensor] = {}  # by slot

    def keep(self, slot: int, values: Tensor) -> None:
        self._there[slot] = values

    def store(self, batch: int, slot: int) -> Chains:
        lane = LaneName.HOST if self._device.shares_host_memory else LaneName.FROM_DEVICE
        return ((Stage(lane, partial(self._fetch, batch, slot)),),)

    def _fetch(self, batch: int, slot: int) -> None:
        # Where copies are enqueued, the values must stay until the next ones of the slot, which wait for the copies.
        values = self._there.pop(slot) if self._device.shares_host_memory else self._there[slot]
        for row, source in zip(self._prompts.batches[batch], values, strict=True):
            n, columns = self._places[row]
            target = self._target[n, columns]
            self._device.from_device(target, source[len(source) - len(target) :])


class AllPositions:
    """The output of one block: its logits and hidden states come to host memory."""

    by_token = False
    can_finish = False

    def __init__(self, logits: _Kept, hidden: Mapping[int, _Kept], last_only: bool) -> None:
        self._logits = logits
        self._hidden = hidden
        self.last_only = last_only

    def keep_hidden(self, layer: int, slot: int, hidden: Tensor) -> None:
        if layer in self._hidden:
            self._hidden[layer].keep(slot, hidden)

    def store_hidden(self, layer: int, batch: int, slot: int) -> Chains:
        return self._hidden[layer].store(batch, slot) if layer in self._hidden else ()

    def wants_hidden(self, layer: int) -> bool:
        return layer in self._hidden

    def keep(self, token: int, batch: int, slot: int, logits: Tensor) -> None:
        self._logits.keep(slot, logits)

    def store(self, token: int, batch: int, slot: int) -> Chains:
        return self._logits.store(batch, slot)

    def following(self, token: int) -> None:
        return None


class Forward:
    """The results of a forward pass, block by block, in host memory and in the dtype of the computation.

    `logits` (prompts, width, vocab), of the last position alone (prompts, 1, vocab). `hidden`: (prompts, width,
    hidden) in transformers' order: embeddings, what each transformer layer but the last gives, and what the LM
    head multiplies, which is the last layer's behind the final norm (and behind the projection that OPT-350m
    has). All are zero in the padding.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        request: Request,
        dtype: torch.dtype,
        last_only: bool = False,
        hidden_states: bool = False,
    ) -> None:
        self._request = request
        self._last_only = last_only
        rows, width = len(request.prompts), request.width
        self.logits = torch.zeros(rows, 1 if last_only else width, layers[0].spec.vocab_size, dtype=dtype)
        sizes = hidden_sizes(layers) if hidden_states else {}
        self._hidden = {layer: torch.zeros(rows, width, size, dtype=dtype) for layer, size in sizes.items()}

    @property
    def hidden(self) -> tuple[Tensor, ...]:
        return tuple(self._hidden.values())

    def output(self, prompts: Prompts, rows: Sequence[int], device: ComputeDevice) -> AllPositions:
        """The output of the block that has these rows of the request."""
        columns = self._request.columns
        places = [(n, slice(int(columns[n][0]), int(columns[n][-1]) + 1)) for n in rows]
        hidden = {layer: _Kept(target, prompts, places, device) for layer, target in self._hidden.items()}
        if self._last_only:
            places = [(n, slice(0, 1)) for n in rows]
        return AllPositions(_Kept(self.logits, prompts, places, device), hidden, self._last_only)


def hidden_sizes(layers: Sequence[Layer]) -> dict[int, int]:
    """Of the layers whose results are hidden states in transformers' sense, by number: their width."""
    spec, head = layers[0].spec, len(layers) - 1
    whole = [j for j, layer in enumerate(layers) if isinstance(layer, MLP)]
    if not whole:  # attention and MLP are one layer
        whole = [j for j, layer in enumerate(layers) if isinstance(layer, AttentionLayer)]
    return dict.fromkeys([0, *whole[:-1]], spec.hidden_size) | {head: spec.embed_size}


def hidden_needs(
    layers: Sequence[Layer], request: Request, cells: int, dtype: torch.dtype, shared: bool, policy: Policy
) -> list[Need]:
    """What the hidden states take: in host memory, and of `cells` batches while they leave the device."""
    each = sum(hidden_sizes(layers).values()) * dtype.itemsize
    rows = batch_sizes(policy, len(request.prompts))[0]
    leaving = cells * activation_bytes(layers[0].spec, rows, request.longest, dtype)
    return [
        Need(Tier.CPU, "hidden states", "home", len(request.prompts) * request.width * each),
        Need(Tier.CPU if shared else Tier.GPU, "hidden states", "workspace", leaving),
    ]
