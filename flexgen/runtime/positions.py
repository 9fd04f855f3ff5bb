"""The results of a forward pass at every position: logits, and the hidden states after each transformer layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from flexgen.layout.hidden import activation_bytes
from flexgen.layout.needs import Need
from flexgen.layout.plan import SLOTS, batch_sizes, staging_bytes
from flexgen.layout.topology import Topology
from flexgen.memory.device import ComputeDevice
from flexgen.memory.machine import Machine
from flexgen.memory.store import tensor_at
from flexgen.memory.taken import Taken
from flexgen.memory.transfer import Chains, Stage
from flexgen.models import Layer
from flexgen.models.layer import AttentionLayer
from flexgen.models.mlp import FeedForward
from flexgen.policy import Policy, Tier
from flexgen.results.trace import LaneName
from flexgen.runtime.cell import BoundCell
from flexgen.runtime.prefix import SharedPrefix
from flexgen.runtime.prompts import Prompts
from flexgen.runtime.request import Request


class _Part(NamedTuple):
    """Positions `begin` to `end` of one row of a batch, counted without its padding, at byte `offset` of a buffer."""

    row: int
    begin: int
    end: int
    offset: int


class _Kept:
    """Moves values of one kind from a block's batches to `target` (prompts of the call, width, size).

    `target` is pageable memory for the caller: a GPU's copy to it would block the thread that issues the steps. So
    values cross the link in pieces to `staging`, a buffer of each cell slot, and the host copies each piece to
    `target`.
    """

    def __init__(
        self,
        target: Tensor,
        prompts: Prompts,
        places: Sequence[tuple[int, slice]],
        device: ComputeDevice,
        staging: Sequence[Tensor],
    ) -> None:
        """places: for each row of the block, its number and its columns in `target`.
        staging: buffers for at least one position each; none if the device computes in host memory."""
        self._target = target
        self._prompts = prompts
        self._places = places
        self._device = device
        self._staging = staging
        self._there: dict[int, Tensor] = {}  # by slot

    def keep(self, cell: BoundCell, values: Tensor) -> None:
        self._there[cell.slot] = values

    def store(self, cell: BoundCell) -> Chains:
        batch, slot = cell.batch, cell.slot
        if self._device.shares_host_memory:
            return ((Stage(LaneName.HOST, partial(self._copy, batch, slot)),),)
        stages: list[Stage] = []
        for piece in self._pieces(batch, self._staging[slot].nbytes):
            stages.append(Stage(LaneName.FROM_DEVICE, partial(self._fetch, batch, slot, piece)))
            stages.append(Stage(LaneName.HOST, partial(self._put, batch, slot, piece)))
        return (tuple(stages),)

    def _pieces(self, batch: int, room: int) -> Iterator[list[_Part]]:
        """Divide the positions of a batch into pieces of at most `room` bytes."""
        piece: list[_Part] = []
        taken, each = 0, self._target[0, 0].nbytes
        for row, n in enumerate(self._prompts.batches[batch]):
            columns = self._places[n][1]
            begin, count = 0, columns.stop - columns.start
            while begin < count:
                end = min(count, begin + (room - taken) // each)
                if end == begin:
                    yield piece
                    piece, taken = [], 0
                    continue
                piece.append(_Part(row, begin, end, taken))
                taken += (end - begin) * each
                begin = end
        if piece:
            yield piece

    def _staged(self, slot: int, part: _Part) -> Tensor:
        shape = part.end - part.begin, *self._target.shape[2:]
        return tensor_at(self._staging[slot], part.offset, shape, self._target.dtype)

    def _fetch(self, batch: int, slot: int, piece: Sequence[_Part]) -> None:
        for part in piece:
            source = self._values(batch, slot, part.row)
            self._device.from_device(self._staged(slot, part), source[part.begin : part.end])

    def _put(self, batch: int, slot: int, piece: Sequence[_Part]) -> None:
        for part in piece:
            self._at_home(batch, part.row)[part.begin : part.end] = self._staged(slot, part)

    def _copy(self, batch: int, slot: int) -> None:
        for row in range(len(self._prompts.batches[batch])):
            self._at_home(batch, row).copy_(self._values(batch, slot, row))
        del self._there[slot]

    def _at_home(self, batch: int, row: int) -> Tensor:
        """The part of `target` for a row, (its positions, size)."""
        n, columns = self._places[self._prompts.batches[batch][row]]
        return self._target[n, columns]

    def _values(self, batch: int, slot: int, row: int) -> Tensor:
        """The values of a row, without its padding, on the device."""
        values = self._there[slot][row]
        return values[len(values) - len(self._at_home(batch, row)) :]


class AllPositions:
    """The output of one block, which moves logits and hidden states to host memory. Close it after the run."""

    by_token = False
    can_finish = False

    def __init__(self, logits: _Kept, hidden: Mapping[int, _Kept], last_only: bool, taken: Taken) -> None:
        self._logits = logits
        self._hidden = hidden
        self.last_only = last_only
        self._taken = taken

    def close(self) -> None:
        """Release the staging buffers."""
        self._taken.close()

    def keep_hidden(self, cell: BoundCell, hidden: Tensor) -> None:
        if cell.layer in self._hidden:
            self._hidden[cell.layer].keep(cell, hidden)

    def store_hidden(self, cell: BoundCell) -> Chains:
        return self._hidden[cell.layer].store(cell) if cell.layer in self._hidden else ()

    def wants_hidden(self, layer: int) -> bool:
        return layer in self._hidden

    def keep(self, cell: BoundCell, logits: Tensor) -> None:
        self._logits.keep(cell, logits)

    def store(self, cell: BoundCell) -> Chains:
        return self._logits.store(cell)

    def following(self, token: int) -> None:
        return None


class Forward:
    """The results of a forward pass, block by block, in host memory and in the dtype of the computation.

    `logits`: (prompts, width, vocab), or (prompts, 1, vocab) for only the last position. `hidden`: (prompts, width,
    hidden) in transformers' order: embeddings, the result of each transformer layer except the last, and the input of
    the LM head's product, which is the last layer's result after the final norm (and the projection of OPT-350m). All
    are zero for padding.
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

    def output(
        self, prompts: Prompts, rows: Sequence[int], machine: Machine, slots: int = SLOTS
    ) -> AllPositions:
        """The output of the block with these rows of the request, or of a block that computes a part of a prefix, for
        one row. slots: the number of cell slots."""
        taken, device = Taken(), machine.device
        largest = max(map(len, prompts.batches))

        def staging(targets: Iterable[Tensor]) -> list[Tensor]:
            """Staging buffers for kinds of values that leave one after another."""
            shapes = [target.shape for target in targets]
            if device.shares_host_memory or not shapes:
                return []
            most, dtype = device.topology.pieces.result_bytes, self.logits.dtype
            nbytes = max(staging_bytes(largest, positions, n, dtype, most) for _, positions, n in shapes)
            return [taken.buffer(machine.host, nbytes, "results") for _ in range(slots)]

        places = []
        for n, length in zip(rows, prompts.lengths, strict=True):
            begin = int(self._request.columns[n][0]) + prompts.shared
            places.append((n, slice(begin, begin + length)))
        # A slot's next cell waits until hidden states have left. Logits leave together with the last hidden states.
        staged = staging(self._hidden.values())
        hidden = {
            layer: _Kept(target, prompts, places, device, staged) for layer, target in self._hidden.items()
        }
        if self._last_only:
            places = [(n, slice(0, 1)) for n in rows]
        logits = _Kept(self.logits, prompts, places, device, staging([self.logits]))
        return AllPositions(logits, hidden, self._last_only, taken)

    def spread(self, rows: Sequence[int], prefix: Sequence[SharedPrefix]) -> None:
        """Copy the results of each part of a prefix from the row that computed them to `rows`, which share them."""
        for target in (*(() if self._last_only else (self.logits,)), *self.hidden):
            for part in prefix:
                source = target[part.row, self._at(part.row, part.tokens)]
                for row in rows:
                    if row != part.row:
                        target[row, self._at(row, part.tokens)] = source

    def _at(self, row: int, tokens: range) -> slice:
        """The columns of these tokens of a row."""
        begin = int(self._request.columns[row][0])
        return slice(begin + tokens.start, begin + tokens.stop)


def hidden_sizes(layers: Sequence[Layer]) -> dict[int, int]:
    """The width of the hidden states by number of the layer, for the layers whose result transformers returns."""
    spec, head = layers[0].spec, len(layers) - 1
    whole = [j for j, layer in enumerate(layers) if isinstance(layer, FeedForward)]
    if not whole:  # attention and MLP form one layer
        whole = [j for j, layer in enumerate(layers) if isinstance(layer, AttentionLayer)]
    return dict.fromkeys([0, *whole[:-1]], spec.hidden_size) | {head: spec.embed_size}


def hidden_needs(
    layers: Sequence[Layer],
    request: Request,
    cells: int,
    dtype: torch.dtype,
    topology: Topology,
    policy: Policy,
) -> list[Need]:
    """The needs of the hidden states in host memory, and of `cells` batches that leave the device."""
    each = sum(hidden_sizes(layers).values()) * dtype.itemsize
    rows = batch_sizes(policy, len(request.prompts))[0]
    leaving = cells * activation_bytes(layers[0].spec, rows, request.longest, dtype)
    size = max(hidden_sizes(layers).values())
    staged = staging_bytes(rows, request.width, size, dtype, topology.pieces.result_bytes)
    return [
        Need(Tier.CPU, "hidden states", "staging", 0 if topology.shares_host_memory else cells * staged),
        Need(Tier.CPU, "hidden states", "home", len(request.prompts) * request.width * each),
        Need(topology.device, "hidden states", "workspace", leaving),
    ]
