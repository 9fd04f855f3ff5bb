"""One result, shown as a card or written as a line of JSON; shared by runs and predictions."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flexgen.policy import Policy, Split, Tier
from flexgen.trace import LaneName
from flexgen.units import format_bytes, format_seconds

ByTier = Mapping[Tier, int]

_DERIVED = (
    "total_s",
    "prefill_tokens_s",
    "decode_tokens_s",
    "throughput_tokens_s",
    "bottleneck",
    "bound_share",
)
"""Properties of a report that its JSON has beside its fields."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a run (or its prediction) took.

    Seconds; bytes by tier; tokens/s of the prefill (prompt tokens), of the decode (all but each row's first new
    token) and over all (new tokens / total). `lanes`: seconds that each lane alone would take.
    `placement`: percent by class and tier, asked and achieved. `padded_share`: padding among the prompt positions
    that were computed, 0 to 1. `projected_from`: tokens that were run, where the decode was projected from fewer
    than `gen_len`. `perplexity`: of the right answers, where they are known.
    """

    model: str
    policy: Policy
    device: str
    dtype: str
    order: str
    prompt_len: int
    gen_len: int
    num_prompts: int
    prefill_s: float
    decode_s: float
    prompt_tokens: int
    padded_share: float = 0.0
    lanes: Mapping[LaneName, float] = field(default_factory=dict)
    plan_bytes: ByTier
    peak_bytes: ByTier
    placement: Mapping[str, Mapping[Tier, tuple[float, float]]]
    projected_from: int | None = None
    perplexity: float | None = None

    @property
    def total_s(self) -> float:
        return self.prefill_s + self.decode_s

    @property
    def prefill_tokens_s(self) -> float:
        return _rate(self.prompt_tokens, self.prefill_s)

    @property
    def decode_tokens_s(self) -> float:
        return _rate(self.num_prompts * (self.gen_len - 1), self.decode_s)

    @property
    def throughput_tokens_s(self) -> float:
        return _rate(self.num_prompts * self.gen_len, self.total_s)

    @property
    def bottleneck(self) -> LaneName | None:
        """The lane that alone would take longest: no order of steps can be faster."""
        return max(self.lanes, key=lambda lane: self.lanes[lane]) if self.lanes else None

    @property
    def bound_share(self) -> float | None:
        """The bottleneck's seconds over the total: 1 is all that the hardware gives under this policy."""
        return self.lanes[self.bottleneck] / self.total_s if self.bottleneck else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        placement = {
            str(tier): {
                what: dict(zip(("asked", "achieved"), by_tier[tier], strict=True))
                for what, by_tier in self.placement.items()
            }
            for tier in Tier
        }
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return fields | {
            "policy": self.policy.to_dict(),
            "lanes": {str(lane): seconds for lane, seconds in self.lanes.items()},
            "plan_bytes": {str(tier): count for tier, count in self.plan_bytes.items()},
            "peak_bytes": {str(tier): count for tier, count in self.peak_bytes.items()},
            "placement": placement,
            **{name: getattr(self, name) for name in _DERIVED},
        }

    def to_json(self) -> str:
        """One line."""
        return json.dumps(self.to_dict(), allow_nan=False)

    def card(self) -> str:
        """For people: sizes, placement, times, bytes and the share of the bound."""
        rows = [
            ("model", f"{self.model}, {self.dtype} on {self.device}"),
            ("prompts", self._sizes()),
            ("schedule", self._schedule()),
            *self._placement_rows(),
            ("prefill", f"{format_seconds(self.prefill_s)}, {self.prefill_tokens_s:,.1f} tokens/s"),
            ("decode", self._decode()),
            (
                "throughput",
                f"{self.throughput_tokens_s:,.1f} tokens/s ({format_seconds(self.total_s)} in all)",
            ),
            *(
                (f"bytes {tier}", self._bytes(tier))
                for tier in Tier
                if self.plan_bytes[tier] or self.peak_bytes[tier]
            ),
        ]
        if self.bottleneck:
            rows += [("lanes alone", self._lanes()), ("bound", self._bound())]
        if self.perplexity is not None:
            rows.append(("perplexity", f"{self.perplexity:.4f} of the right answers"))
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {text}" for name, text in rows]
        rule = "-" * max(map(len, lines))
        return "\n".join([rule, *lines, rule])

    def _sizes(self) -> str:
        mean = self.prompt_tokens / self.num_prompts
        ragged = "" if math.isclose(mean, self.prompt_len) else f" ({mean:.1f} on average)"
        sizes = (
            f"{self.num_prompts} of up to {self.prompt_len} tokens{ragged}, {self.gen_len} new tokens each"
        )
        return sizes + (f", {self.padded_share:.1%} padding" if self.padded_share else "")

    def _schedule(self) -> str:
        shape = f"blocks of {self.policy.num_gpu_batches} x {self.policy.gpu_batch_size} prompts"
        return f"{self.order}, {shape}"

    def _placement_rows(self) -> list[tuple[str, str]]:
        rows = []
        for what, by_tier in self.placement.items():
            split: Split = getattr(self.policy, what)
            parts = []
            for tier, (asked, achieved) in by_tier.items():
                if asked or achieved:
                    codec = split[tier].codec
                    kept = "" if codec == "none" else f" in {codec}"
                    parts.append(f"{tier} {achieved:.1f}%{kept} (asked {asked:g})")
            rows.append((what, ", ".join(parts)))
        return rows

    def _decode(self) -> str:
        projected = f", projected from {self.projected_from} tokens" if self.projected_from else ""
        return f"{format_seconds(self.decode_s)}, {self.decode_tokens_s:,.1f} tokens/s{projected}"

    def _bytes(self, tier: Tier) -> str:
        return f"{format_bytes(self.plan_bytes[tier])} planned, {format_bytes(self.peak_bytes[tier])} at the peak"

    def _lanes(self) -> str:
        ordered = sorted(self.lanes.items(), key=lambda pair: -pair[1])
        return ", ".join(f"{lane} {format_seconds(seconds)}" for lane, seconds in ordered)

    def _bound(self) -> str:
        assert self.bottleneck and self.bound_share is not None
        return f"{self.bound_share:.0%} of what the hardware gives here; {self.bottleneck} is the bottleneck"


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
