"""Random numbers that depend only on a seed, a row and a token.

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11). It is
counter-based: it has no state, so the order of the draws does not matter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

MAX_SEED = (1 << 64) - 1
_ROUNDS = 10
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_WORD = np.uint64(0xFFFFFFFF)
_WORD_BITS = np.uint64(32)
_TORCH_SEEDS = 1 << 62


def philox(counter: np.ndarray, key: int) -> np.ndarray:
    """Random words (4, n) for counters (4, n) and a key of 64 bits. Each word is a uint64 below 2**32."""
    low, high = key & int(_WORD), key >> 32
    a, b, c, d = counter
    for n in range(_ROUNDS):
        round_low, round_high = (
            (k + n * step) & int(_WORD) for k, step in zip((low, high), _KEY_STEPS, strict=True)
        )
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]  # 32 by 32 bits: exact in 64
        a, b = (second >> _WORD_BITS) ^ b ^ np.uint64(round_low), second & _WORD
        c, d = (first >> _WORD_BITS) ^ d ^ np.uint64(round_high), first & _WORD
    return np.stack([a, b, c, d])


def uniforms(seed: int, rows: Sequence[int], token: int | Sequence[int], device: torch.device) -> Tensor:
    """One number per row, float64 (rows,) in [0, 1) with 53 random bits, on `device`.

    token: that of all rows, or of each. seed, rows and token must be below 2**64. The host does not wait for the
    device.
    """
    numbers = np.array(rows, dtype=np.uint64)
    tokens = np.broadcast_to(np.array(token, dtype=np.uint64), numbers.shape)
    counter = [numbers & _WORD, numbers >> _WORD_BITS, tokens & _WORD, tokens >> _WORD_BITS]
    words = philox(np.stack(counter), seed)
    bits = (words[0] << _WORD_BITS | words[1]) >> np.uint64(11)
    # A few tens of bytes. The host computes them, which costs one copy; a device would run a hundred tiny kernels.
    made = torch.from_numpy(bits.astype(np.float64) * 2.0**-53)
    if device.type == "cuda":
        # torch caches pinned memory of this size and reuses it after a copy from it has ended.
        with contextlib.suppress(RuntimeError):  # without pinned memory, the copy waits for the device
            made = made.pin_memory()
    return made.to(device, non_blocking=True)


def seed_from_torch() -> int:
    """A seed from torch's global generator, so that `torch.manual_seed` makes later draws reproducible."""
    return int(torch.randint(_TORCH_SEEDS, ()))
