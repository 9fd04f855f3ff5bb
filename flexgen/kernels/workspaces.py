"""What the libraries and kernels of a device take in addition to operands and results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from flexgen.kernels import half_linear
from flexgen.kernels.flash_splits import split_bytes
from flexgen.units import KIB, MIB

BFLOAT16_CAPABILITY = 8.0
"""The compute capability of the first NVIDIA GPUs with instructions for bfloat16. On older ones torch emulates the
type, and its only attention for the type builds all scores."""

_CUBLAS_BYTES = 8320 * KIB
_LARGE_CUBLAS_BYTES = 32 * MIB
"""What torch gives cuBLAS for each stream of a thread, unless you set CUBLAS_WORKSPACE_CONFIG."""
_LARGE_CUBLAS_CAPABILITY = 9.0
"""The first compute capability with the large workspace."""

_HEAD_IN_REGISTERS = 128
"""The largest head whose result attention without FlashAttention accumulates in registers."""

_CHOICE_BYTES = 64 * MIB
_CHOICE_EACH = 50
"""Bytes that drawing an id takes for each number in a row of logits, with all filters."""


def choice_rows(vocab: int) -> int:
    """Rows of logits (rows, vocab) that ids are drawn for at once."""
    return max(_CHOICE_BYTES // (_CHOICE_EACH * vocab), 1)


def choice_bytes(rows: int, vocab: int) -> int:
    """Most bytes that drawing ids takes, in addition to logits (rows, vocab)."""
    return min(rows, choice_rows(vocab)) * vocab * _CHOICE_EACH


class Workspaces(Protocol):
    """Bytes of temporary memory, by operation."""

    @property
    def fixed(self) -> int:
        """What libraries keep while a model computes, whatever it computes."""

    @property
    def captured(self) -> int | None:
        """What they keep for the CUDA graphs of a call, in addition; None where the device captures none."""

    def product(self, rows: int, out_size: int, in_size: int, dtype: torch.dtype) -> int:
        """Of x (rows, in_size) times a matrix (out_size, in_size)."""

    def attention(
        self, rows: int, heads: int, queries: int, keys: int, head_dim: int, dtype: torch.dtype
    ) -> int:
        """Of attention of a prompt's `queries` over `keys` tokens, the same number of heads on both sides."""


@dataclass(frozen=True)
class HostWorkspaces:
    """Of the CPU, and of the device that is emulated on it."""

    fixed: int = 0
    captured: int | None = None

    def product(self, rows: int, out_size: int, in_size: int, dtype: torch.dtype) -> int:
        return half_linear.workspace_bytes(rows, out_size, in_size, dtype)

    def attention(
        self, rows: int, heads: int, queries: int, keys: int, head_dim: int, dtype: torch.dtype
    ) -> int:
        return 0


@dataclass(frozen=True)
class GpuWorkspaces:
    """Of a GPU. `fixed` is the workspace of cuBLAS for one stream of one thread. `captured` is that of the stream
    that captures graphs, and None for GPUs that are not NVIDIA's.

    native_bfloat16: whether the GPU has instructions for bfloat16. Those that have them have FlashAttention too.
    multiprocessors: how many it has. Where it is not known, of a Hopper.
    """

    fixed: int = _LARGE_CUBLAS_BYTES
    native_bfloat16: bool = True
    multiprocessors: int = 132
    captured: int | None = None

    def product(self, rows: int, out_size: int, in_size: int, dtype: torch.dtype) -> int:
        return 0

    def attention(
        self, rows: int, heads: int, queries: int, keys: int, head_dim: int, dtype: torch.dtype
    ) -> int:
        if dtype is torch.float32:
            return 0
        q, k, scores = (rows * heads * n for n in (queries * head_dim, keys * head_dim, queries * keys))
        if dtype is torch.bfloat16 and not self.native_bfloat16:
            # In float32: queries, keys and values, scaled copies of the first two, scores, masked scores and the
            # mask. The probabilities are there in both types. Not all of these exist at once.
            mask = torch.float32.itemsize * queries * keys
            return max(4 * scores + 12 * q + 16 * k, 10 * scores + 8 * q + 4 * k) + mask
        accumulated = q * torch.float32.itemsize if head_dim > _HEAD_IN_REGISTERS else 0
        if not self.native_bfloat16:
            return accumulated
        sums = rows * heads * keys * torch.float32.itemsize
        return max(accumulated, sums + split_bytes(rows, heads, keys, head_dim, self.multiprocessors))


def gpu_workspaces(capability: float) -> GpuWorkspaces:
    """Of an NVIDIA GPU with that compute capability, such as 8.6."""
    cublas = _LARGE_CUBLAS_BYTES if capability >= _LARGE_CUBLAS_CAPABILITY else _CUBLAS_BYTES
    return GpuWorkspaces(cublas, native_bfloat16=capability >= BFLOAT16_CAPABILITY, captured=cublas)


HOST = HostWorkspaces()
GPU = GpuWorkspaces()
"""Of a GPU of which nothing more is known."""
