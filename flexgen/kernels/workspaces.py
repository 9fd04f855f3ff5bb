"""The memory that a device's libraries and kernels allocate in addition to operands and results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from flexgen.kernels import groupwise_linear, half_linear, norms
from flexgen.kernels.flash_splits import split_bytes
from flexgen.units import KIB, MIB

BFLOAT16_CAPABILITY = 8.0
"""The compute capability of the first NVIDIA GPUs with bfloat16 instructions. On older GPUs, torch emulates the type,
and its only attention for the type stores all scores."""

_CUBLAS_BYTES = 8320 * KIB
_LARGE_CUBLAS_BYTES = 32 * MIB
"""The cuBLAS workspace that torch allocates per thread and stream, unless you set CUBLAS_WORKSPACE_CONFIG."""
_LARGE_CUBLAS_CAPABILITY = 9.0
"""The lowest compute capability with the large workspace."""

_HEAD_IN_REGISTERS = 128
"""The largest head size for which attention without FlashAttention accumulates results in registers."""

_CHOICE_BYTES = 64 * MIB
_CHOICE_EACH = 50
"""Bytes of temporaries per logit when an id is drawn with all filters."""


def choice_rows(vocab: int) -> int:
    """The number of rows of logits (rows, vocab) for which ids are drawn at once."""
    return max(_CHOICE_BYTES // (_CHOICE_EACH * vocab), 1)


def choice_bytes(rows: int, vocab: int) -> int:
    """The maximum bytes allocated to draw ids, in addition to the logits (rows, vocab)."""
    return min(rows, choice_rows(vocab)) * vocab * _CHOICE_EACH


class Workspaces(Protocol):
    """Bytes of temporary memory for each operation."""

    @property
    def fixed(self) -> int:
        """Bytes that libraries keep while a model computes, regardless of the operation."""

    @property
    def captured(self) -> int | None:
        """Additional bytes that libraries keep for the CUDA graphs of a call, or None if the device captures none."""

    def product(self, rows: int, out_size: int, in_size: int, dtype: torch.dtype) -> int:
        """Bytes for x (rows, in_size) times a matrix (out_size, in_size)."""

    def attention(
        self, rows: int, heads: int, queries: int, keys: int, head_dim: int, dtype: torch.dtype
    ) -> int:
        """Bytes for attention of a prompt's `queries` over `keys` tokens, with the same heads on both sides."""

    def rms_norm(self, rows: int, size: int, dtype: torch.dtype) -> int:
        """Bytes for the RMS norm of x (rows, size)."""


@dataclass(frozen=True)
class HostWorkspaces:
    """Workspaces of the CPU and of the emulated device."""

    fixed: int = 0
    captured: int | None = None

    def product(self, rows: int, out_size: int, in_size: int, dtype: torch.dtype) -> int:
        # The matrix may be plain or encoded.
        encoded = groupwise_linear.workspace_bytes(rows, in_size, dtype)
        return max(half_linear.workspace_bytes(rows, out_size, in_size, dtype), encoded)

    def attention(
        self, rows: int, heads: int, queries: int, keys: int, head_dim: int, dtype: torch.dtype
    ) -> int:
        return 0

    def rms_norm(self, rows: int, size: int, dtype: torch.dtype) -> int:
        return norms.host_workspace_bytes(rows, size, dtype)


@dataclass(frozen=True)
class GpuWorkspaces:
    """Workspaces of a GPU. `fixed` is the workspace of cuBLAS for one stream of one thread. `captured` is that of the
    stream that captures graphs, or None for GPUs other than NVIDIA's.

    native_bfloat16: whether the GPU has bfloat16 instructions. GPUs with them also have FlashAttention.
    multiprocessors: the number of multiprocessors; the default is that of a Hopper GPU.
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
            # mask. Probabilities exist in both types. Not all of these exist at the same time.
            mask = torch.float32.itemsize * queries * keys
            return max(4 * scores + 12 * q + 16 * k, 10 * scores + 8 * q + 4 * k) + mask
        accumulated = q * torch.float32.itemsize if head_dim > _HEAD_IN_REGISTERS else 0
        if not self.native_bfloat16:
            return accumulated
        sums = rows * heads * keys * torch.float32.itemsize
        return max(accumulated, sums + split_bytes(rows, heads, keys, head_dim, self.multiprocessors))

    def rms_norm(self, rows: int, size: int, dtype: torch.dtype) -> int:
        # torch has one kernel for it, but only for the most usual norms.
        return norms.torch_workspace_bytes(rows, size)


def gpu_workspaces(capability: float) -> GpuWorkspaces:
    """The workspaces of an NVIDIA GPU with that compute capability, such as 8.6."""
    cublas = _LARGE_CUBLAS_BYTES if capability >= _LARGE_CUBLAS_CAPABILITY else _CUBLAS_BYTES
    return GpuWorkspaces(cublas, native_bfloat16=capability >= BFLOAT16_CAPABILITY, captured=cublas)


HOST = HostWorkspaces()
GPU = GpuWorkspaces()
"""The workspaces of an unknown GPU."""
