"""Policies: the placement of weights, KV cache and activations, and the shape of a block.

A `Policy` is immutable, validated data. Its keyword arguments are the keys of its TOML file. It does not depend on
models or devices; plans and predictions compute its cost.
"""

from __future__ import annotations

import dataclasses
import math
import pkgutil
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from fractions import Fraction
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any

from flexgen.errors import PolicyError, cut, did_you_mean, shown
from flexgen.policy.fields import Converted, fraction, percentage, refuse_unknown, whole_number

CODECS = (
    "none",
    *sorted(m.name for m in pkgutil.iter_modules([f"{Path(__file__).parents[1]}/quant/codecs"])),
)
"""The names of codecs: "none" and the modules in `flexgen/quant/codecs`. To import them would import torch."""
STORED = "stored"
"""The codec of weights that keeps the form of a quantized checkpoint. Plain weights have no codec then."""

SUM_TOLERANCE = 1e-6
"""The tolerance for the sum of the three percentages of a split."""


class Tier(StrEnum):
    """A kind of memory, fastest first: device memory, host memory, files on disk."""

    GPU = "gpu"
    CPU = "cpu"
    DISK = "disk"


@dataclass(frozen=True)
class Share:
    """The part of a split on one tier: `percent` (0 to 100), stored with `codec`."""

    percent: float
    codec: str = "none"

    def __post_init__(self) -> None:
        object.__setattr__(self, "percent", percentage(self.percent))
        known = (*CODECS, STORED)
        if not isinstance(self.codec, str) or self.codec not in known:
            all_known = f"{', '.join(known)}{did_you_mean(self.codec, known)}"
            raise PolicyError(f"codec {shown(self.codec)} is not known; known: {all_known}")

    @classmethod
    def of(cls, given: ShareLike) -> Share:
        """A share from a percentage, a mapping with `percent` and optionally `codec`, or a share."""
        if isinstance(given, Share):
            return given
        if not isinstance(given, Mapping):
            return cls(given)
        refuse_unknown(given, ("percent", "codec"))
        if "percent" not in given:
            raise PolicyError(
                f"{shown(given)} has no percent; write {{ percent = 50, codec = {CODECS[0]!r} }} or a number"
            )
        return cls(**given)


ShareLike = Share | float | Mapping[str, Any]


@dataclass(frozen=True)
class Split:
    """The distribution of one kind of data over the tiers. The three percentages sum to 100."""

    gpu: Converted[ShareLike, Share] = Converted(Share.of, Share(0.0))
    cpu: Converted[ShareLike, Share] = Converted(Share.of, Share(0.0))
    disk: Converted[ShareLike, Share] = Converted(Share.of, Share(0.0))

    def __post_init__(self) -> None:
        total = math.fsum(self.percent(tier) for tier in Tier)
        if abs(total - 100) > SUM_TOLERANCE:
            parts = " + ".join(f"{tier} {_number(self.percent(tier))}" for tier in Tier)
            change = f"add {100 - total:g} to" if total < 100 else f"take {total - 100:g} from"
            raise PolicyError(f"{parts} is {total:g} percent; the sum must be 100: {change} one of them")

    @classmethod
    def of(cls, given: SplitLike) -> Split:
        """A split from a mapping such as {"gpu": 20, "cpu": {"percent": 80, "codec": "none"}}."""
        if isinstance(given, Split):
            return given
        if not isinstance(given, Mapping):
            kind = type(given).__name__
            raise PolicyError(
                f"{shown(given)} ({kind}) is not a split; write percentages by tier: {{ gpu = 20, cpu = 80 }}"
            )
        refuse_unknown(given, tuple(Tier))
        return cls(**given)

    def __getitem__(self, tier: Tier | str) -> Share:
        share: Share = getattr(self, tier if isinstance(tier, Tier) else Tier(tier))
        return share

    def percent(self, tier: Tier | str) -> float:
        """Percent on `tier`, 0 to 100."""
        return self[tier].percent

    def rows(self, count: int) -> dict[Tier, range]:
        """Divide `count` rows into contiguous ranges in the order gpu, cpu, disk.

        Uses Webster's method. Each tier is within one row of its exact share (this holds for three tiers, not for
        more), a tier of 0 percent gets no rows, and a smaller count gets no more rows on any tier. So buffers for a
        batch also fit a smaller batch. Ties go to the faster tier.
        """
        if count < 0:
            raise ValueError(f"cannot split {count} rows; the count must be >= 0")
        return dict(_rows(tuple(self.percent(tier) for tier in Tier), count))


@lru_cache(maxsize=4096)  # a plan and its predictions repeat the same few arguments
def _rows(given: tuple[float, ...], count: int) -> dict[Tier, range]:
    # Fractions, because a float quota close to an integer could lose or add a row.
    percents = dict(zip(Tier, map(Fraction, given), strict=True))
    total = sum(percents.values())
    quotas = {tier: count * percent / total for tier, percent in percents.items()}
    lengths = {tier: math.floor(quota) for tier, quota in quotas.items()}
    # The priority of a tier with n rows for the next row is its percentage / (2n + 1).
    by_worth = sorted(Tier, key=lambda tier: -percents[tier] / (2 * lengths[tier] + 1))
    for tier in by_worth[: count - sum(lengths.values())]:
        lengths[tier] += 1
    ranges, start = {}, 0
    for tier in Tier:
        ranges[tier] = range(start, start + lengths[tier])
        start += lengths[tier]
    return ranges


SplitLike = Split | Mapping[str, Any]
_ALL_GPU = Split(gpu=100.0)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A policy: the placement of the data, and the shape of a block. Raises PolicyError for invalid values.

    gpu_batch_size, num_gpu_batches: a block has `gpu_batch_size * num_gpu_batches` prompts. The weights of each layer
        are loaded once for all batches of a block.
    weights, cache, activations: percentages by tier, with an optional codec for weights and cache.
    attend_on: "cpu" or "gpu", the processor that computes attention over cache that is not in GPU memory.
    attn_sparsity: the share of the cached values that a decode step uses: those with the largest attention scores.
        1 is exact.
    prefill_chunk: the maximum number of tokens per prompt in one pass. With 0, a pass computes whole prompts if
        they fit, and parts of them otherwise.
    prefill_rows: the maximum number of prompts that a pass computes, in small cells between those of rows that
        decode. So prompts enter at a constant rate, also at the beginning of a call. With 0, all that have a place
        enter together.
    overlap: overlap transfers with the computation.
    sep_layer: stream attention and MLP as two units.
    pin_weight: pin all host memory that a GPU reads: weights, cache, hidden states and staging.
    share_prefix: compute and store the tokens with which all prompts of a call begin only once.
    guess: the maximum number of guesses of the next tokens of a row that a pass of the decode also computes. A guess
        copies what followed an earlier occurrence of the newest tokens in the prompt or its answer. It does not
        change the result. 0 makes no guesses.
    reserve_new: the number of new tokens for which the cache of each row in host memory is reserved, on average over
        the rows of a block. Rows take memory as they grow. If more rows are long, some are put back to wait, and are
        computed again later. 0 reserves the maximum number of new tokens for every row.
    """

    gpu_batch_size: int = 1
    num_gpu_batches: int = 1
    weights: Converted[SplitLike, Split] = Converted(Split.of, _ALL_GPU)
    cache: Converted[SplitLike, Split] = Converted(Split.of, _ALL_GPU)
    activations: Converted[SplitLike, Split] = Converted(Split.of, _ALL_GPU)
    attend_on: str = "cpu"
    attn_sparsity: float = 1.0
    prefill_chunk: int = 0
    prefill_rows: int = 0
    overlap: bool = True
    sep_layer: bool = True
    pin_weight: bool = True
    share_prefix: bool = True
    guess: int = 0
    reserve_new: int = 0

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("gpu_batch_size", "num_gpu_batches"), 1)
        counts |= dict.fromkeys(("prefill_chunk", "prefill_rows", "guess", "reserve_new"), 0)
        for name, least in counts.items():
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least))
        if not isinstance(self.attend_on, str) or self.attend_on not in (Tier.CPU, Tier.GPU):
            raise PolicyError(f'attend_on is {shown(self.attend_on)}; it must be "cpu" or "gpu"')
        for tier in Tier:
            if (codec := self.activations[tier].codec) != "none":
                raise PolicyError(
                    f"activations: codec {codec!r} on {tier}; only weights and cache can have a codec, "
                    "leave it out here"
                )
        object.__setattr__(self, "attn_sparsity", fraction("attn_sparsity", self.attn_sparsity))
        for tier in Tier:
            if self.attn_sparsity < 1 and (codec := self.cache[tier].codec) != "none":
                raise PolicyError(
                    f"attn_sparsity is {self.attn_sparsity:g} with codec {codec!r} for the cache on {tier}; "
                    "sparse attention needs a cache without a codec: leave out one of the two"
                )
        for name, reason in (
            ("guess", self._against_guesses()),
            ("reserve_new", self._against_reserves()),
            ("prefill_rows", self._against_prefill_rows()),
        ):
            if (value := getattr(self, name)) and reason:
                raise PolicyError(f"{name} is {value} with {reason}; set {name} to 0 or change the other one")
        for name in ("overlap", "sep_layer", "pin_weight", "share_prefix"):
            if not isinstance(value := getattr(self, name), bool):
                raise PolicyError(
                    f"{name} is {shown(value)} ({type(value).__name__}); it must be true or false"
                )

    def _against_guesses(self) -> str | None:
        """The field with which guesses do not work: with them, rows have different numbers of cached tokens."""
        if self.attn_sparsity < 1:
            return (
                f"attn_sparsity = {self.attn_sparsity:g}, which chooses tokens for one new token of each row"
            )
        if percent := self.cache.percent(Tier.DISK):
            return f"{percent:g} percent of the cache on disk, where a page has the same tokens of all rows"
        return None

    def _against_reserves(self) -> str | None:
        """The field with which rows cannot be computed again with the same result."""
        if self.attn_sparsity < 1:
            return f"attn_sparsity = {self.attn_sparsity:g}, which applies to new tokens but not to prompts"
        if self.guess:
            return f"guess = {self.guess}, with which rows of a batch have different numbers of new tokens"
        return None

    def reserves(self, gen_len: int) -> bool:
        """Whether a call with up to `gen_len` new tokens per row reserves less cache than all rows may need."""
        return 0 < self.reserve_new < gen_len

    def _against_prefill_rows(self) -> str | None:
        """The field with which prompts cannot enter in the places of single rows."""
        if percent := self.cache.percent(Tier.DISK):
            return f"{percent:g} percent of the cache on disk, where all rows of a batch are written together"
        if (percent := self.activations.percent(Tier.GPU)) < 100:
            return f"{percent:g} percent of the activations on gpu, but it needs 100: only a few prompts have many"
        if self.attn_sparsity < 1:
            return f"attn_sparsity = {self.attn_sparsity:g}, which needs equal lengths of all rows of a batch"
        if self.guess:
            return f"guess = {self.guess}, which starts with all rows of a batch"
        if self.reserve_new:
            return f"reserve_new = {self.reserve_new}, which puts whole batches back to wait"
        return None

    @property
    def lengths_differ(self) -> bool:
        """Whether the rows of a batch may have different numbers of cached tokens."""
        return self.guess > 0 or self.prefill_rows > 0

    @property
    def block_size(self) -> int:
        """Prompts in one block."""
        return self.gpu_batch_size * self.num_gpu_batches

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Policy:
        """A policy from the keys of its TOML; the inverse of `to_dict`."""
        if not isinstance(fields, Mapping):
            raise PolicyError(f"the policy is a {type(fields).__name__}; give a mapping of its fields")
        refuse_unknown(fields, tuple(field.name for field in dataclasses.fields(cls)))
        return cls(**fields)

    @classmethod
    def from_percent(
        cls, w_gpu: float, w_cpu: float, c_gpu: float, c_cpu: float, a_gpu: float, a_cpu: float, **fields: Any
    ) -> Policy:
        """A policy from the GPU and CPU percentages of weights, cache and activations; the rest is on disk."""
        given = {"weights": (w_gpu, w_cpu), "cache": (c_gpu, c_cpu), "activations": (a_gpu, a_cpu)}
        return cls.from_dict(fields | {name: _rest_on_disk(name, *pair) for name, pair in given.items()})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Policy:
        """Read a policy from a TOML file. Raises PolicyError, with the path, for a missing or invalid file."""
        name = cut(str(path))
        try:
            with open(path, "rb") as file:
                fields = tomllib.load(file)
        except OSError as error:
            raise PolicyError(
                f"{name}: cannot read the policy: {error.strerror}; give the path of a TOML file"
            ) from error
        except ValueError as error:  # not UTF-8, not TOML, a number of thousands of digits, a NUL in the path
            raise PolicyError(f"{name}: not valid TOML: {error}; correct the file") from error
        except RecursionError:
            raise PolicyError(
                f"{name}: not valid TOML: values are nested too deeply; a policy needs at most two levels"
            ) from None
        try:
            return cls.from_dict(fields)
        except PolicyError as error:
            raise PolicyError(f"{name}: {error}") from None

    def save(self, path: str | PathLike[str], comment: str | None = None) -> None:
        """Write the policy as a TOML file that `load` reads, with `comment` (such as its origin) at the top."""
        lines = [f"# {line}".rstrip() for line in _printable(comment or "").splitlines()]
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        width = max(map(len, fields))
        lines += [f"{name:<{width}} = {_toml(value)}" for name, value in fields.items()]
        Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """The policy as plain data for JSON: all keys of the TOML file, with splits as {tier: {percent, codec}}."""
        return dataclasses.asdict(self)

    def replace(self, **changes: Any) -> Policy:
        """A copy of the policy with some fields changed."""
        refuse_unknown(changes, self.__dataclass_fields__)
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class Auto:
    """A request to search for the best policy for the machine and the workload.

    fixed: fields that the search must not change, by name, in any form that `Policy` accepts.
    lossy: allow codecs, which round weights and cache.
    once: use the policy of the first search for all calls, even if a call differs from the workload.
    worth: without `once`, a call that differs from the workload gets its own search if its predicted time is more
    than `worth` times that of the first search.

    Raises PolicyError for invalid fields.
    """

    fixed: Mapping[str, Any] = field(default_factory=dict)
    lossy: bool = False
    once: bool = False
    worth: float = 20.0

    def __post_init__(self) -> None:
        policy = Policy.from_dict(self.fixed)
        object.__setattr__(self, "fixed", {name: getattr(policy, name) for name in self.fixed})


def _rest_on_disk(name: str, gpu: float, cpu: float) -> Split:
    try:
        shares = Share.of(gpu), Share.of(cpu)
        rest = 100 - math.fsum(share.percent for share in shares)
        if rest < -SUM_TOLERANCE:
            percents = " + ".join(
                f"{tier} {share.percent:g}" for tier, share in zip(Tier, shares, strict=False)
            )
            raise PolicyError(
                f"{percents} is {100 - rest:g} percent; the sum must be at most 100: lower one of them"
            )
        # A rest of 1e-14 is a rounding error, not a share for the disk.
        return Split(*shares, disk=rest if rest > SUM_TOLERANCE else 0.0)
    except PolicyError as error:
        raise PolicyError(f"{name}: {error}") from None


def _printable(text: str) -> str:
    # TOML allows no control characters in a comment.
    lines = text.splitlines()
    return "\n".join("".join(c if c.isprintable() or c == "\t" else " " for c in line) for line in lines)


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)


def _toml(value: Split | Share | str | bool | int | float) -> str:
    if isinstance(value, Split):
        shares = [f"{tier} = {_toml(value[tier])}" for tier in Tier if value[tier] != Share(0.0)]
        return "{ " + ", ".join(shares) + " }"
    if isinstance(value, Share):
        percent = _number(value.percent)
        return percent if value.codec == "none" else f'{{ percent = {percent}, codec = "{value.codec}" }}'
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value) if isinstance(value, int | float) else f'"{value}"'
