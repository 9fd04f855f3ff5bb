"""The policy of FlexGen 0.1, and its translation to a policy of this engine."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from flexgen import policy
from flexgen.errors import PolicyError, shown
from flexgen.policy import Share, Split, Tier
from flexgen.quant import CODECS
from flexgen.quant.groupwise import Groupwise

_WEIGHT_DIMS = (0, 1)
"""Both dimensions of a matrix are accepted; groups are always along its rows."""
_CACHE_DIMS = (2,)
"""The dimension of a head in the cache of 0.1, which has the shape (tokens, rows * heads, head_dim)."""


@dataclass
class CompressionConfig:
    """Integers of `num_bits` bits in groups of `group_size` along `group_dim`; no compression unless `enabled`."""

    num_bits: int
    group_size: int
    group_dim: int
    symmetric: bool
    enabled: bool = True


@dataclass(frozen=True)
class Policy:
    """The fields of FlexGen 0.1 in their order. Percentages are 0 to 100; the rest of each pair is on disk.

    The constructor raises PolicyError for a policy that this engine does not support.
    """

    gpu_batch_size: int
    num_gpu_batches: int
    w_gpu_percent: float
    w_cpu_percent: float
    cache_gpu_percent: float
    cache_cpu_percent: float
    act_gpu_percent: float
    act_cpu_percent: float
    overlap: bool
    sep_layer: bool
    pin_weight: bool
    cpu_cache_compute: bool
    attn_sparsity: float
    compress_weight: bool
    comp_weight_config: CompressionConfig | None
    compress_cache: bool
    comp_cache_config: CompressionConfig | None

    def __post_init__(self) -> None:
        self.to_policy()

    @property
    def w_disk_percent(self) -> float:
        return 100 - self.w_gpu_percent - self.w_cpu_percent

    @property
    def cache_disk_percent(self) -> float:
        return 100 - self.cache_gpu_percent - self.cache_cpu_percent

    @property
    def act_disk_percent(self) -> float:
        return 100 - self.act_gpu_percent - self.act_cpu_percent

    def to_policy(self) -> policy.Policy:
        """The same policy as a `flexgen.Policy`, which can be saved as TOML. Raises PolicyError."""
        weights, cache = "none", "none"
        if self.compress_weight:
            weights = _codec("comp_weight_config", self.comp_weight_config, _WEIGHT_DIMS)
        if self.compress_cache:
            cache = _codec("comp_cache_config", self.comp_cache_config, _CACHE_DIMS)
        plain = policy.Policy.from_percent(
            *map(_percent, (self.w_gpu_percent, self.w_cpu_percent)),
            *map(_percent, (self.cache_gpu_percent, self.cache_cpu_percent)),
            *map(_percent, (self.act_gpu_percent, self.act_cpu_percent)),
            gpu_batch_size=self.gpu_batch_size,
            num_gpu_batches=self.num_gpu_batches,
            attend_on="cpu" if self.cpu_cache_compute else "gpu",
            attn_sparsity=self.attn_sparsity,
            overlap=bool(self.overlap),
            sep_layer=bool(self.sep_layer),
            pin_weight=bool(self.pin_weight),
        )
        return plain.replace(
            weights=_with_codec(plain.weights, weights), cache=_with_codec(plain.cache, cache)
        )


def _percent(value: float) -> float:
    """The value, or 0 or 100 if it differs from them by rounding, like the -1e-10 of 0.1's cost model."""
    try:
        nearest = min(max(value, 0), 100)
        return nearest if abs(value - nearest) <= policy.SUM_TOLERANCE else value
    except (TypeError, ValueError):
        return value  # not a number; `flexgen.Policy` raises for it


def _codec(field: str, config: CompressionConfig | None, dims: Collection[int]) -> str:
    """The name of the codec for a configuration, at least as exact as the configuration."""
    if not isinstance(config, CompressionConfig):
        raise PolicyError(
            f"{field} is {shown(config)}, but compression is enabled; give CompressionConfig(num_bits=4, "
            f"group_size=64, group_dim={next(iter(dims))}, symmetric=False)"
        )
    if not config.enabled:
        return "none"
    groupwise = [codec for codec in CODECS.values() if type(codec) is Groupwise]
    groups = {codec.group: codec for codec in groupwise if codec.bits == config.num_bits}
    if not groups:
        known = ", ".join(map(str, sorted({codec.bits for codec in groupwise})))
        raise PolicyError(f"{field}: num_bits is {shown(config.num_bits)}; supported: {known}")
    if not isinstance(config.group_size, int) or config.group_size < (least := min(groups)):
        raise PolicyError(
            f"{field}: group_size is {shown(config.group_size)}; supported groups have {least} values and would be "
            f"less exact than smaller ones: give {least} or more"
        )
    codec = groups[max(size for size in groups if size <= config.group_size)]
    if config.group_dim not in dims:
        known = " or ".join(map(str, dims))
        raise PolicyError(f"{field}: group_dim is {shown(config.group_dim)}; supported: {known}")
    if config.symmetric:
        raise PolicyError(
            f"{field}: symmetric groups are not supported (nor were they in 0.1): give symmetric=False"
        )
    return codec.name


def _with_codec(split: Split, codec: str) -> Split:
    """The same percentages, each with `codec`."""
    shares = {tier: split.percent(tier) for tier in Tier}
    return Split(**{str(tier): Share(percent, codec) for tier, percent in shares.items() if percent})
