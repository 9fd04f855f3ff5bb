"""Frequencies of rotary positions: one function for each scaling, from its published definition.

The arithmetic has the same order as in transformers, so the frequencies are equal to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flexgen.models.spec import RopeSpec

Parameters = Mapping[str, Any]
"""The `rope_parameters` of a config, with `rope_theta` and the lengths needed for the kind."""


class ReadParameters(Mapping[str, Any]):
    """The parameters of a RoPE. The object records which ones were read."""

    def __init__(self, values: dict[str, Any], read: Sequence[str]) -> None:
        self._values = values
        # "type" is the old name of rope_type; "finetuned" does not change the frequencies.
        self._read = {"rope_type", "type", "finetuned", *read}

    def __getitem__(self, field: str) -> Any:
        self._read.add(field)
        return self._values[field]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def unread(self) -> list[str]:
        """The names that were not read and have a value."""
        return [
            field for field, value in self._values.items() if field not in self._read and value is not None
        ]


def rope_spec(parameters: Parameters, head_dim: int, max_positions: int) -> RopeSpec:
    """The RoPE of `parameters` for heads of `head_dim` values.

    `max_positions` is the config's max_position_embeddings. Raises KeyError, TypeError, ValueError or ArithmeticError
    for missing or invalid parameters.
    """
    kind = parameters.get("rope_type", "default")
    stated = parameters.get("original_max_position_embeddings")
    # `dynamic` scales from max_position_embeddings and ignores other lengths.
    original = int(max_positions if stated is None or kind == "dynamic" else stated)
    optional = kind in ("default", "longrope", "proportional")
    factor = parameters.get("factor") if optional else parameters["factor"]
    if factor is None:
        factor = max_positions / original if kind == "longrope" else 1.0
    if kind == "dynamic" and head_dim < 4:
        raise ValueError(f"dynamic scaling needs a head_dim of at least 4, not {head_dim}")
    inv_freq, scaling = KINDS[kind](parameters, factor, head_dim, original)
    long_inv_freq = None
    if kind == "longrope":
        long_inv_freq = _divided(parameters, "long_factor", head_dim)
    factor, theta, scaling = float(factor), float(parameters["rope_theta"]), float(scaling)
    finite = all(map(math.isfinite, (theta, scaling, factor * original))) and all(
        values is None or bool(values.isfinite().all()) for values in (inv_freq, long_inv_freq)
    )
    if original < 1 or factor <= 0 or not finite:
        raise ValueError("lengths, factors and frequencies must be finite and positive")
    return RopeSpec(
        kind=kind,
        inv_freq=tuple(inv_freq.tolist()),
        scaling=scaling,
        theta=theta,
        factor=factor,
        original_max_positions=original,
        long_inv_freq=() if long_inv_freq is None else tuple(long_inv_freq.tolist()),
    )


def _wavelengths(theta: Any, dim: int) -> Tensor:
    """Wavelengths of the pairs divided by 2 pi, (dim / 2) float32. "RoFormer", arXiv 2104.09864, section 3.2."""
    lengths: Tensor = theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    return lengths


def _default(parameters: Parameters, factor: Any, dim: int, original: int) -> tuple[Tensor, float]:
    return 1.0 / _wavelengths(parameters["rope_theta"], dim), 1.0


def _linear(parameters: Parameters, factor: Any, dim: int, original: int) -> tuple[Tensor, float]:
    """Positions divided by the factor. "Extending Context Window via Position Interpolation", arXiv 2306.15595."""
    inv_freq, scaling = _default(parameters, factor, dim, original)
    return inv_freq / factor, scaling


def _dynamic(parameters: Parameters, factor: Any, dim: int, original: int) -> tuple[Tensor, float]:
    """NTK-aware scaling of the base, for a text of the original length. `ops.rope_tables` handles longer texts."""
    stretch = (factor * original / original) - (factor - 1)
    return 1.0 / _wavelengths(parameters["rope_theta"] * stretch ** (dim / (dim - 2)), dim), 1.0


def _yarn(parameters: Parameters, factor: Any, dim: int, original: int) -> tuple[Tensor, float]:
    """`linear` for long wavelengths, `default` for short ones, with a ramp. "YaRN", arXiv 2309.00071, section 3."""
    theta = parameters["rope_theta"]

    def pair_of(rotations: float) -> float:
        """The index of the pair that rotates `rotations` times over the original length."""
        return (dim * math.log(original / (rotations * 2 * math.pi))) / (2 * math.log(theta))

    low = pair_of(parameters.get("beta_fast") or 32)
    high = pair_of(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # the ramp divides by the difference
    kept = 1 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    lengths = _wavelengths(theta, dim)
    inv_freq = 1.0 / (factor * lengths) * (1 - kept) + 1.0 / lengths * kept
    scaling, scale, over = (parameters.get(f) for f in ("attention_factor", "mscale", "mscale_all_dim"))
    if scaling is None:
        scaling = _mscale(factor, scale) / _mscale(factor, over) if scale and over else _mscale(factor, 1)
    return inv_freq, scaling


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _longrope(parameters: Parameters, factor: Any, dim: int, original: int) -> tuple[Tensor, float]:
    """A factor for each pair, with other factors beyond the original length. "LongRoPE", arXiv 2402.13753."""
    scaling = parameters.get("attention_factor")
    if scaling is None:
        scaling = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return _divided(parameters, "short_factor", dim), scaling


def _divided(parameters: Parameters, field: str, dim: int) -> Tensor:
    factors = parameters[field]
    if len(factors) != dim // 2:  # torch would broadcast a single factor
        raise ValueError(f"{field} must have head_dim / 2 = {dim // 2} factors")
    lengths = _wavelengths(parameters["rope_theta"], dim)
    return 1.0 / (torch.tensor(factors, dtype=torch.float32) * lengths)


def _llama3(parameters: Parameters, factor: Any, dim: int, original: int) -> tuple[Tensor, float]:
    """`linear` for wavelengths above original / low_freq_factor, `default` below original / high_freq_factor, and a
    mixture between them. From apply_scaling in the code of Llama 3.1."""
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    inv_freq, scaling = _default(parameters, factor, dim, original)
    wavelength = 2 * math.pi / inv_freq
    slow, fast = wavelength > original / low, wavelength < original / high
    scaled = torch.where(slow, inv_freq / factor, inv_freq)
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * scaled / factor + smooth * scaled
    return torch.where(~slow & ~fast, between, scaled), scaling


def _proportional(parameters: Parameters, factor: Any, dim: int, original: int) -> tuple[Tensor, float]:
    """`linear` for the first share of the pairs of a head. The other pairs are not rotated. From Gemma 4."""
    rotated = int(parameters.get("partial_rotary_factor", 1.0) * dim // 2)
    inv_freq, scaling = _linear(parameters, factor, dim, original)
    inv_freq[rotated:] = 0.0
    return inv_freq, scaling


KINDS: dict[str, Callable[[Parameters, Any, int, int], tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
    "proportional": _proportional,
}
"""The scalings by their names in configs. Each function takes (parameters, factor, head_dim, original length) and
returns the frequencies, (head_dim / 2) float32, and the factor of cos and sin."""
