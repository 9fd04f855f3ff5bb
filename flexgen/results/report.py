"""The report of a run or a prediction, as a card or as a line of JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from flexgen.policy import Policy, Split, Tier
from flexgen.results.bounds import bound_seconds
from flexgen.results.threads import ThreadCounts
from flexgen.results.trace import LaneName, Phase
from flexgen.units import format_bytes, format_seconds

ByTier = Mapping[Tier, int]
ByPhase = Mapping[Phase, Mapping[LaneName, float]]

_PREDICTED = (
    "prefill_s",
    "decode_s",
    "total_s",
    "prefill_tokens_s",
    "decode_tokens_s",
    "throughput_tokens_s",
    "bound_s",
    "bottleneck",
)
"""The fields of the prediction in a report's JSON, in addition to its phases."""

_DERIVED = (
    "total_s",
    "prefill_tokens_s",
    "decode_tokens_s",
    "throughput_tokens_s",
    "bound_s",
    "bottleneck",
    "bound_share",
    "roofline_s",
    "roofline_share",
    "goal_share",
)
"""The properties in a report's JSON, in addition to its fields."""


class Stage(StrEnum):
    """The stages of a call in which prompts enter when rows have ended: before the first enters, while prompts wait,
    and after the last has entered."""

    FILL = "fill"
    STEADY = "steady"
    DRAIN = "drain"


class PlacesUsed(NamedTuple):
    """The seconds of a stage, and the share of the block's places whose row still generates, 0 to 1."""

    seconds: float
    used: float


@dataclass(frozen=True, kw_only=True)
class Report:
    """The time and memory of a run or of its prediction.

    Times are in seconds, sizes in bytes by tier, speeds in tokens/s: of the prefill (prompt tokens), of the decode
    (all new tokens but the first of each row) and of the whole run (new tokens / total time).

    padded_share: the share of padding in the computed prompt positions, 0 to 1.
    phases: for each phase, the seconds that each lane needs if it runs alone.
    roofline: for each phase, the seconds of each lane for its bytes and flops, at the rates of the measured machine.
    peak_bytes: measured; empty in a prediction.
    placement: percentages by kind of data and tier, requested and achieved.
    projected_from: the number of tokens that ran, if the decode time is extrapolated from fewer than `gen_len`.
    new_tokens: the new tokens of all prompts, if some stopped before `gen_len`.
    perplexity: the perplexity of the correct answers, if they are known.
    predicted: the prediction of the same run, if the machine's figures are known.
    prefix: the number of tokens with which all prompts begin and that are computed once.
    prefix_groups: the number of groups of prompts, each with its own prefix.
    reused_tokens: the number of tokens of the prompts that were computed for another prompt only.
    stages: those of a call in which prompts entered when rows had ended.
    guesses_made, guesses_kept: the numbers of guesses of next tokens (`Policy.guess`) that passes computed, and of
        those that were right. A prediction has none.
    put_back: the number of times that a row was put back to wait because the cache had too few pages
        (`Policy.reserve_new`).
    threads: the threads that ran it; None in a prediction.
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
    phases: ByPhase = field(default_factory=dict)
    roofline: ByPhase = field(default_factory=dict)
    plan_bytes: ByTier
    peak_bytes: ByTier
    placement: Mapping[str, Mapping[Tier, tuple[float, float]]]
    projected_from: int | None = None
    new_tokens: int | None = None
    perplexity: float | None = None
    predicted: Report | None = None
    prefix: int = 0
    prefix_groups: int = 1
    reused_tokens: int = 0
    stages: Mapping[Stage, PlacesUsed] = field(default_factory=dict)
    guesses_made: int = 0
    guesses_kept: int = 0
    put_back: int = 0
    threads: ThreadCounts | None = None

    @property
    def total_s(self) -> float:
        """The time of prefill and decode in seconds."""
        return self.prefill_s + self.decode_s

    @property
    def prefill_tokens_s(self) -> float:
        """Prompt tokens per second of the prefill."""
        return _rate(self.prompt_tokens, self.prefill_s)

    @property
    def decode_tokens_s(self) -> float:
        """New tokens per second of the decode, without the first token of each row."""
        return _rate(self._made - self.num_prompts, self.decode_s)

    @property
    def throughput_tokens_s(self) -> float:
        """New tokens per second of the total time."""
        return _rate(self._made, self.total_s)

    @property
    def copied(self) -> float:
        """The mean number of new tokens of a row in a pass of the decode, as in `Workload`."""
        later = self._made - self.num_prompts
        return later / (later - self.guesses_kept) if self.guesses_kept else 1.0

    @property
    def _made(self) -> int:
        return self.num_prompts * self.gen_len if self.new_tokens is None else self.new_tokens

    @property
    def lanes(self) -> dict[LaneName, float]:
        """The seconds that each lane needs for both phases if it runs alone."""
        return {
            lane: sum(lanes.get(lane, 0.0) for lanes in self.phases.values())
            for lane in LaneName
            if any(lane in lanes for lanes in self.phases.values())
        }

    @property
    def busy(self) -> dict[LaneName, float]:
        """`lanes` as shares of the total time."""
        return {lane: seconds / self.total_s for lane, seconds in self.lanes.items()} if self.total_s else {}

    @property
    def waits_for(self) -> dict[Phase, LaneName]:
        """The slowest lane of each phase, if each ran alone."""
        return {
            phase: max(lanes, key=lambda lane: lanes[lane]) for phase, lanes in self.phases.items() if lanes
        }

    @property
    def bottleneck(self) -> LaneName | None:
        """The lane with the largest part of the bound."""
        parts: dict[LaneName, float] = {}
        for phase, lane in self.waits_for.items():
            parts[lane] = parts.get(lane, 0.0) + self.phases[phase][lane]
        return max(parts, key=lambda lane: parts[lane]) if parts else None

    @property
    def bound_s(self) -> float | None:
        """The lower bound of the time in seconds; see `bound_seconds`."""
        return bound_seconds(self.phases) if self.waits_for else None

    @property
    def bound_share(self) -> float | None:
        """The bound divided by the total time. 1 is the best that the hardware allows with this policy."""
        return None if self.bound_s is None else self.bound_s / self.total_s

    @property
    def roofline_s(self) -> float | None:
        """The seconds of the slowest lane of each phase for its bytes and flops; None if the machine is not known."""
        return bound_seconds(self.roofline) if any(self.roofline.values()) else None

    @property
    def roofline_share(self) -> float | None:
        """The roofline divided by the total time.

        The bound is measured, so it counts a lane as busy while it waits for its next kernel. The roofline does not.
        """
        return None if self.roofline_s is None else self.roofline_s / self.total_s

    @property
    def goal_share(self) -> float | None:
        """The smaller one of the known shares, for comparison with a goal."""
        known = [share for share in (self.bound_share, self.roofline_share) if share is not None]
        return min(known, default=None)

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
            "lanes": _plain(self.lanes),
            "busy": _plain(self.busy),
            "phases": _plain_phases(self.phases),
            "roofline": _plain_phases(self.roofline),
            "waits_for": {str(phase): str(lane) for phase, lane in self.waits_for.items()},
            "plan_bytes": {str(tier): count for tier, count in self.plan_bytes.items()},
            "peak_bytes": {str(tier): count for tier, count in self.peak_bytes.items()},
            "placement": placement,
            "stages": {str(stage): found._asdict() for stage, found in self.stages.items()},
            "threads": self.threads and dataclasses.asdict(self.threads),
            "predicted": self.predicted and self.predicted._prediction(),
            **{name: getattr(self, name) for name in _DERIVED},
        }

    def _prediction(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _PREDICTED} | {"phases": _plain_phases(self.phases)}

    def to_json(self) -> str:
        """The report as one line of JSON."""
        return json.dumps(self.to_dict(), allow_nan=False)

    def card(self) -> str:
        """The report as text: sizes, placement, times, bytes and the share of the bound."""
        rows = [
            ("model", f"{self.model}, {self.dtype} on {self.device}"),
            *([("threads", str(self.threads))] if self.threads else []),
            ("prompts", self._sizes()),
            *([("prefix", self._prefix())] if self.prefix or self.prefix_groups > 1 else []),
            ("schedule", self._schedule()),
            *self._placement_rows(),
            ("prefill", self._prefill()),
            ("decode", self._decode()),
            *([("stages", self._stages())] if self.stages else []),
            *([("reserved", self._reserved())] if self.policy.reserves(self.gen_len) else []),
            *([("guesses", self._guesses())] if self.guesses_made else []),
            ("throughput", self._throughput()),
            *(
                (f"bytes {tier}", self._bytes(tier))
                for tier in Tier
                if self.plan_bytes[tier] or self.peak_bytes.get(tier)
            ),
        ]
        if self.waits_for:
            rows += [(f"{phase} lanes", self._lanes(phase)) for phase in self.waits_for]
            rows.append(("bound", self._bound()))
        if self.roofline_share is not None:
            rows.append(("roofline", self._roofline()))
        if self.perplexity is not None:
            rows.append(("perplexity", f"{self.perplexity:.4f} of the correct answers"))
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {text}" for name, text in rows]
        rule = "-" * max(map(len, lines))
        return "\n".join([rule, *lines, rule])

    def _sizes(self) -> str:
        mean = self.prompt_tokens / self.num_prompts
        ragged = "" if math.isclose(mean, self.prompt_len) else f" ({mean:.1f} on average)"
        early = f" at most, {self.new_tokens} in total" if self.new_tokens is not None else ""
        sizes = f"{self.num_prompts} of up to {self.prompt_len} tokens{ragged}, {self.gen_len} new tokens each{early}"
        return sizes + (f", {self.padded_share:.1%} padding" if self.padded_share else "")

    def _prefix(self) -> str:
        if self.prefix_groups == 1:
            return f"{self.prefix:,} tokens, computed once for {self.num_prompts:,} prompts"
        saved = self.reused_tokens / self.prompt_tokens
        return (
            f"{self.prefix:,} tokens of all prompts, and more in {self.prefix_groups:,} groups: {saved:.0%} of the "
            "prompts' tokens were not computed again"
        )

    def _guesses(self) -> str:
        right = f"{self.guesses_kept:,} of {self.guesses_made:,} guesses were right"
        return f"{self.copied:.2f} tokens accepted a pass: {right}"

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
                    in_codec = "" if codec == "none" else f" in {codec}"
                    parts.append(f"{tier} {achieved:.1f}%{in_codec} (requested {asked:g})")
            rows.append((what, ", ".join(parts)))
        return rows

    def _prefill(self) -> str:
        took = f"{format_seconds(self.prefill_s)}, {self.prefill_tokens_s:,.1f} tokens/s"
        return took + (f"; predicted {format_seconds(self.predicted.prefill_s)}" if self.predicted else "")

    def _decode(self) -> str:
        projected = f", projected from {self.projected_from} tokens" if self.projected_from else ""
        took = f"{format_seconds(self.decode_s)}, {self.decode_tokens_s:,.1f} tokens/s{projected}"
        return took + (f"; predicted {format_seconds(self.predicted.decode_s)}" if self.predicted else "")

    def _stages(self) -> str:
        return ", ".join(
            f"{stage} {format_seconds(seconds)} with {used:.0%} of the places in use"
            for stage, (seconds, used) in self.stages.items()
        )

    def _reserved(self) -> str:
        tokens = f"{self.policy.reserve_new:,} of {self.gen_len:,} new tokens per row"
        return f"cache for {tokens} on average; rows were put back to wait {self.put_back:,} times"

    def _throughput(self) -> str:
        took = f"{self.throughput_tokens_s:,.1f} tokens/s ({format_seconds(self.total_s)} in total)"
        if self.predicted is None:
            return took
        ratio = self.predicted.throughput_tokens_s / self.throughput_tokens_s
        return f"{took}; predicted {self.predicted.throughput_tokens_s:,.1f} tokens/s, {ratio:.0%} of it"

    def _bytes(self, tier: Tier) -> str:
        peak = f", {format_bytes(self.peak_bytes[tier])} at the peak" if tier in self.peak_bytes else ""
        return f"{format_bytes(self.plan_bytes[tier])} planned{peak}"

    def _lanes(self, phase: Phase) -> str:
        ordered = sorted(self.phases[phase].items(), key=lambda pair: -pair[1])
        took = self.prefill_s if phase is Phase.PREFILL else self.decode_s
        shares = ((lane, alone, f" ({alone / took:.0%})" if took else "") for lane, alone in ordered)
        return "timed alone: " + ", ".join(
            f"{lane} {format_seconds(alone)}{share}" for lane, alone, share in shares
        )

    def _bound(self) -> str:
        assert self.bound_share is not None
        (first, lane), *others = self.waits_for.items()
        waits = f"{first} waits for {lane}" + "".join(f", {phase} for {other}" for phase, other in others)
        if others and {lane} == {other for _, other in others}:
            waits = f"the run waits for {lane}"
        return f"{self.bound_share:.0%} of the best that the hardware allows: {waits}"

    def _roofline(self) -> str:
        assert self.roofline_s is not None and self.roofline_share is not None
        least = format_seconds(self.roofline_s)
        return f"{self.roofline_share:.0%}: bytes and flops alone take {least} at the measured rates"


def _plain_phases(phases: ByPhase) -> dict[str, dict[str, float]]:
    return {str(phase): _plain(lanes) for phase, lanes in phases.items()}


def _plain(lanes: Mapping[LaneName, float]) -> dict[str, float]:
    return {str(lane): seconds for lane, seconds in lanes.items()}


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
