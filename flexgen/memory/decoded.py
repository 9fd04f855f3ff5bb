"""Decoded copies of encoded matrices, in the model's dtype, for visits that multiply many rows with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flexgen.memory.store import Store, tensor_at
from flexgen.quant import MatrixCodec


class Decoding:
    """An encoded weight in the model's dtype, decoded on its first use in a visit."""

    def __init__(self, codec: MatrixCodec[Any], encoded: Any, make: Callable[[], Tensor]) -> None:
        self._codec = codec
        self._encoded = encoded
        self._make = make
        self._out: Tensor | None = None

    def __call__(self) -> Tensor:
        if self._out is None:
            out = self._make()
            self._codec.decode(self._encoded, out)
            self._out = out
        return self._out

    def forget(self) -> None:
        """Mark the decoded matrix as invalid: its buffer may be overwritten, or the slot holds other bytes."""
        self._out = None


class DecodingRoom:
    """A buffer for the decoded matrices of one visit. A call allocates it on its first decoding."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._buffer: Tensor | None = None
        self._decodings: Sequence[Decoding] = ()
        self.visit: object = None
        """The visit that uses the buffer."""

    def serve(self, visit: object, decodings: Sequence[Decoding]) -> None:
        """Assign the buffer to this visit. Does nothing if the visit already has it."""
        if self.visit != visit:
            self._forget()
            self.visit, self._decodings = visit, decodings

    def place(self, nbytes: int, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The place of a matrix in a buffer of at least `nbytes`. May overwrite matrices of an earlier visit."""
        if self._buffer is None or self._buffer.nbytes < nbytes:
            self._release()
            self._buffer = self._store.allocate(nbytes, "decoded weights")
        return tensor_at(self._buffer, offset, shape, dtype)

    def close(self) -> None:
        """Release the buffer; `place` allocates a new one."""
        self._forget()
        self._release()

    def _forget(self) -> None:
        for decoding in self._decodings:
            decoding.forget()
        self.visit, self._decodings = None, ()

    def _release(self) -> None:
        if self._buffer is not None:
            self._store.release(self._buffer)
            self._buffer = None


class DecodingRooms:
    """One room for each of the layers whose cells are computed alternately."""

    def __init__(self, store: Store, count: int) -> None:
        self._rooms = [DecodingRoom(store) for _ in range(count)]
        self._next = 0

    def number(self, visit: object) -> int:
        """The number of the visit's room: its present room, or else the next one."""
        for number, room in enumerate(self._rooms):
            if room.visit == visit:
                return number
        number, self._next = self._next, (self._next + 1) % len(self._rooms)
        return number

    def __getitem__(self, number: int) -> DecodingRoom:
        return self._rooms[number]

    def close(self) -> None:
        """Release all buffers. Call it only while nothing computes."""
        for room in self._rooms:
            room.close()
