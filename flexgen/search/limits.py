"""Explains in words why a policy is not faster."""

from __future__ import annotations

from flexgen.policy import Policy, Tier
from flexgen.predict.job import Job
from flexgen.predict.prediction import Prediction
from flexgen.results.trace import Phase
from flexgen.search.linear import Figures, Solution, shares_of
from flexgen.units import GIB, format_bytes, format_seconds

_FULL = 0.97
"""The share of a tier in use above which it is called full. Below it, the rest may be due to rounding."""


def limits_in_words(
    policy: Policy,
    prediction: Prediction,
    figures: Figures,
    solution: Solution,
    job: Job,
) -> tuple[str, ...]:
    """The slowest lane of each phase with its data, the full tiers with the savings of more memory, and whether
    blocks could be larger."""
    capacity, workload = job.hardware.capacity, job.workload
    report, shares = prediction.report, shares_of(policy)
    in_all = {Phase.PREFILL: report.prefill_s, Phase.DECODE: report.decode_s}
    words = []
    for n, (phase, lane) in enumerate(report.waits_for.items()):
        seconds, spent = report.phases[phase][lane], in_all[phase]
        share = min(seconds / spent, 1.0) if spent else 1.0
        asks = {what: s for what, s in figures.of_lane(n, lane, shares).items() if s > 0}
        total = sum(asks.values())
        parts = [f"{s / total:.0%} {what}" for what, s in sorted(asks.items(), key=lambda a: -a[1])]
        made_of = ": " + ", ".join(p for p in parts if not p.startswith("0%")) if parts else ""
        words.append(f"{lane} is the slowest lane of the {phase}, {share:.0%} of its time{made_of}")
    blocks = -(-workload.num_prompts // policy.block_size)
    for tier in Tier:
        if tier not in capacity:
            continue
        taken = prediction.plan.on(tier)
        saved = solution.saved[tier] * GIB * max(workload.num_prompts / policy.block_size, 1)
        if taken < _FULL * capacity[tier] and saved <= 1e-3 * report.total_s:
            continue
        state = "full" if taken >= _FULL * capacity[tier] else "as full as rounding leaves it"
        full = f"{tier} tier is {state}: {format_bytes(taken)} of {format_bytes(capacity[tier])}"
        if saved > 1e-3 * report.total_s:
            full += f", 1 GiB more would save {format_seconds(saved)} of {format_seconds(report.total_s)}"
        words.append(full)
    if blocks == 1:
        words.append(
            f"one block holds all {workload.num_prompts} prompts; more prompts would share its loads of weights"
        )
    return tuple(words)
