"""`python -m flexgen.tune`: find the best policy for a job on this machine, with trials, and write it to a file.

    python -m flexgen.tune --model opt-30b --weights dummy --prompt-len 512 --gen-len 32 -o policies/opt-30b.toml
    python -m flexgen.tune --model opt-30b --hardware t4 --simulate-only --frontier frontier.png

Searches, runs the best few for real on a part of the job, corrects the machine's figures by what they took, and
searches again, until what the search likes best has been tried.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flexgen.errors import FlexGenError, RequestError
from flexgen.flags import AUTO, add_policy_flags, count, fixed_fields, run
from flexgen.models import ModelSpec, open_model
from flexgen.planning.auto import USUAL, in_words, own_order, this_machine
from flexgen.planning.correct import Seen, corrected
from flexgen.planning.frontier import Point, draw, find_frontier, frontier_table, plotter
from flexgen.planning.hardware import Hardware
from flexgen.planning.measured import find_hardware
from flexgen.planning.search import Candidate, Search, find_policy
from flexgen.policy import Policy
from flexgen.report import Report
from flexgen.trial import Shape, predicted_trial, run_trial, shape_for
from flexgen.workload import Workload

_STEADY = 0.1
"""Repeats whose totals lie within this share of their median are a stable figure."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run(make_parser(), tune, argv)


@dataclass
class Tried:
    """A candidate of the search and its trials.

    `full` is predicted of the whole job before any correction, `predicted` of the trial. The whole job is taken to
    be as many times longer than predicted as the trial was, prefill and decode each.
    """

    candidate: Candidate
    shape: Shape
    full: Report
    predicted: Report
    runs: list[Report] = field(default_factory=list)
    failure: str = ""

    @property
    def spread(self) -> float:
        """Largest difference between the repeats, as a share of their median."""
        totals = [report.total_s for report in self.runs]
        return (max(totals) - min(totals)) / statistics.median(totals)

    @property
    def measured(self) -> Report:
        """The whole job, projected from the median of the trials."""
        prefill = statistics.median(report.prefill_s for report in self.runs)
        decode = statistics.median(report.decode_s for report in self.runs)
        return replace(
            self.full,
            prefill_s=self.full.prefill_s * prefill / self.predicted.prefill_s,
            decode_s=self.full.decode_s
            * (decode / self.predicted.decode_s if self.predicted.decode_s else 1),
        )

    def seen(self) -> Seen:
        """For the correction of the machine's figures."""
        (timed,) = (report for report in self.runs if report.phases)
        return Seen(
            self.candidate.policy,
            timed.dtype,
            self.shape.workload.prompt_len,
            timed.phases,
            self.predicted.phases,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        figures: dict[str, Any] = {
            "policy": self.candidate.policy.to_dict(),
            "order": self.candidate.order,
            "trial": str(self.shape),
            "predicted_tokens_s": self.full.throughput_tokens_s,
        }
        if not self.runs:
            return figures | ({"failure": self.failure} if self.failure else {})
        return figures | {
            "measured_tokens_s": self.measured.throughput_tokens_s,
            "spread": self.spread,
            "trial_s": [report.total_s for report in self.runs],
            "trial_predicted_s": self.predicted.total_s,
        }


class Tuning:
    """The rounds of one tuning: what was tried, and the machine's figures as far as they are corrected."""

    def __init__(
        self, args: argparse.Namespace, spec: ModelSpec, hardware: Hardware, workload: Workload
    ) -> None:
        self._args = args
        self._spec = spec
        self._first = hardware
        self.workload = workload
        self.hardware = hardware
        self.tried: list[Tried] = []
        self.search = self.find(workload)
        _say(in_words(self.search))

    def find(self, workload: Workload) -> Search:
        """Search with the figures as they are now."""
        args = self._args
        return find_policy(
            self._spec,
            self.hardware,
            workload,
            fixed=fixed_fields(args),
            lossy=args.lossy,
            dtype=args.dtype,
            order=args.order,
            top=args.top,
        )

    @property
    def best(self) -> Tried | None:
        """The fastest of those that ran."""
        ran = [tried for tried in self.tried if tried.runs]
        return max(ran, key=lambda tried: tried.measured.throughput_tokens_s, default=None)

    def run(self) -> None:
        """Try, correct and search again until the search finds nothing better that was not tried."""
        for n in range(self._args.rounds):
            new = [candidate for candidate in self._candidates() if self._is_new(candidate)]
            if n and (not new or not self._is_new(self.search.best)):
                return
            args, new = self._args, new[: self._args.top]
            _say(
                f"round {n + 1} of at most {args.rounds}: {len(new)} candidates, {args.repeats} runs each of about "
                f"{args.trial_seconds:g} s, a part of the job"
            )
            self._try(new)
            if not any(tried.runs for tried in self.tried):
                why = "; ".join(sorted({tried.failure for tried in self.tried}))
                raise RequestError(f"none of {len(self.tried)} candidates ran: {why}")
            self.hardware = corrected(self._first, [tried.seen() for tried in self.tried if tried.runs])
            self.search = self.find(self.workload)
            _say(f"with the figures corrected, {in_words(self.search)}")

    def _candidates(self) -> list[Candidate]:
        return [self.search.best, *self.search.runners_up]

    def _is_new(self, candidate: Candidate) -> bool:
        asked = candidate.policy, candidate.order
        return all((tried.candidate.policy, tried.candidate.order) != asked for tried in self.tried)

    def _try(self, candidates: Sequence[Candidate]) -> None:
        """Run every candidate once, and again, so that a drift of the machine meets all of them alike."""
        new = [self._planned(candidate) for candidate in candidates]
        self.tried += new
        repeats = self._args.repeats
        for repeat in range(repeats):
            for tried in new:
                self._run(tried, repeat)
        unsteady = [tried for tried in new if tried.runs and tried.spread > _STEADY]
        for repeat in range(repeats, 2 * repeats):
            for tried in unsteady:
                self._run(tried, repeat)

    def _planned(self, candidate: Candidate) -> Tried:
        policy, order = candidate.policy, candidate.order
        job = self._spec, policy, order, self._first
        shape = shape_for(*job, self.workload, self._args.trial_seconds, self._args.dtype)
        predicted = predicted_trial(*job, shape, self._args.dtype)
        # The whole job, with the figures that the trial is predicted with.
        whole = predicted_trial(*job, Shape(self._spec.num_layers, self.workload), self._args.dtype)
        return Tried(candidate, shape, whole, predicted)

    def _run(self, tried: Tried, repeat: int) -> None:
        if tried.failure:
            return
        args = self._args
        opening = dict(
            model=args.model, weights=args.weights, device=args.device, dtype=args.dtype,
            offload_dir=args.offload_dir, progress=False,
        )  # fmt: skip
        policy, order = tried.candidate.policy, tried.candidate.order
        try:
            report = run_trial(opening, policy, order, tried.shape, lanes=not repeat, seed=args.seed)
        except (FlexGenError, OSError) as error:
            tried.failure = str(error)
            tried.runs.clear()
            _say(f"{words(tried.candidate)}: left out, it failed: {error}")
            return
        tried.runs.append(report)
        _say(
            f"{words(tried.candidate)}: {tried.shape} in {report.total_s:.3g} s, "
            f"predicted {tried.predicted.total_s:.3g} s"
        )


def tune(args: argparse.Namespace) -> None:
    """Find the best policy, and say and write what was found; an interrupt keeps the best so far."""
    if args.policy != AUTO:
        raise RequestError(
            f"--policy {args.policy}: tune finds the policy; give single fields to keep, such as --gpu-batch-size"
        )
    if args.hardware and not args.simulate_only:
        raise RequestError(
            "--hardware is another machine, on which nothing can be tried: add --simulate-only"
        )
    plot = plotter() if args.frontier else None
    spec, _ = open_model(args.model, "dummy" if args.simulate_only else args.weights)
    hardware = (
        find_hardware(args.hardware, args.device, args.offload_dir)
        if args.hardware
        else this_machine(args.device, args.offload_dir)
    )
    tuning = Tuning(args, spec, hardware, Workload(args.prompt_len, args.gen_len, args.num_prompts))
    points: list[Point] = []
    interrupted = None
    try:
        if not args.simulate_only:
            tuning.run()
        points = find_frontier(tuning.find, tuning.workload)
    except KeyboardInterrupt as interrupt:
        interrupted = interrupt
    if tuning.tried:
        print(trials_table(tuning.tried))
        print()
    if points:
        print(frontier_table(points))
        print()
    policy, order, comment = result(args, spec, tuning)
    print(comment)
    if args.output:
        save_policy(policy, args.output, comment)
        print(f"written to {args.output}")
    if args.save_hardware:
        tuning.hardware.save(args.save_hardware)
    if points and plot:
        draw(plot, points, args.frontier, f"{spec.name} on {hardware.name}")
    if args.json:
        found = {
            "model": spec.name,
            "hardware": tuning.hardware.to_dict(),
            "workload": [args.prompt_len, args.gen_len, args.num_prompts],
            "policy": policy.to_dict(),
            "order": order,
            "search": tuning.search.line(),
            "tried": [tried.to_dict() for tried in tuning.tried],
            "frontier": [[point.prompts, point.seconds, point.tokens_s] for point in points],
        }
        with open(args.json, "a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
    if interrupted:
        raise interrupted


def result(args: argparse.Namespace, spec: ModelSpec, tuning: Tuning) -> tuple[Policy, str, str]:
    """The best policy, its order, and where it came from: machine, workload, predicted and measured. A file of the
    policy does not say an order, so what came from where says it, and how to ask for it."""
    best = tuning.best
    candidate = best.candidate if best else tuning.search.best
    predicted = best.full if best else candidate.prediction.report
    hardware = tuning.hardware
    machine = f"{hardware.name} ({hardware.source})" if hardware.source else hardware.name
    named = predicted.order if predicted.order != own_order(candidate.policy, hardware) else None
    lines = [
        f"Found by python -m flexgen.tune on {datetime.date.today().isoformat()}.",
        f"Model: {spec.name}, {predicted.dtype}. Machine: {machine}",
        f"Workload: {args.num_prompts} prompts of {args.prompt_len} tokens, {args.gen_len} new tokens each.",
        f"Order: {predicted.order}{f', not its own: give --order {named} with every run' if named else ''}.",
        f"Predicted: {figures(predicted)}.",
    ]
    if best:
        lines.append(
            f"Measured: {figures(best.measured)}; projected from the median of {len(best.runs)} runs of "
            f"{best.shape}, which differ by {best.spread:.0%}."
        )
    else:
        lines.append("Measured: nothing, it was not run.")
    return candidate.policy, predicted.order, "\n".join([*lines, f"Run it: {command(args, named)}"])


def command(args: argparse.Namespace, order: str | None) -> str:
    """The command that does the whole job with the policy; `order` where it would not run in it by itself."""
    module, machine = ("simulate", args.hardware) if args.hardware else ("bench", None)
    given = {
        "model": args.model,
        "weights": "dummy" if args.weights == "dummy" and not machine else None,
        "policy": args.output or "FILE",
        "order": order,
        "hardware": machine,
        "device": None if machine or args.device == "auto" else args.device,
        "dtype": None if args.dtype == "auto" else args.dtype,
        "offload-dir": None if machine else args.offload_dir,
        "prompt-len": args.prompt_len,
        "gen-len": args.gen_len,
        "num-prompts": args.num_prompts,
    }
    flags = (f"--{name} {shlex.quote(str(value))}" for name, value in given.items() if value is not None)
    return f"python -m flexgen.{module} {' '.join(flags)}"


def figures(report: Report) -> str:
    """The three figures of a report."""
    return (
        f"{report.throughput_tokens_s:,.2f} tokens/s (prefill {report.prefill_tokens_s:,.1f}, "
        f"decode {report.decode_tokens_s:,.2f})"
    )


def words(candidate: Candidate) -> str:
    """A policy and its order in a few words."""
    policy = candidate.policy
    parts = [f"{policy.num_gpu_batches} x {policy.gpu_batch_size}", candidate.order]
    for name in ("weights", "cache", "activations"):
        split = getattr(policy, name)
        shares = (
            f"{split.percent(tier):.0f}% {tier}" for tier in ("gpu", "cpu", "disk") if split.percent(tier)
        )
        parts.append(f"{name} {' '.join(shares)}")
    return ", ".join(parts)


def trials_table(tried: Sequence[Tried]) -> str:
    """A line for each candidate, the fastest first."""
    rows = []
    for one in sorted(tried, key=lambda t: -t.measured.throughput_tokens_s if t.runs else 0.0):
        measured = (
            f"{one.measured.throughput_tokens_s:10.2f} {one.spread:7.0%}"
            if one.runs
            else f"{'failed' if one.failure else 'not run':>18}"
        )
        rows.append(f"{one.full.throughput_tokens_s:10.2f} {measured}  {words(one.candidate)}")
    return "\n".join([f"{'predicted':>10} {'measured':>10} {'spread':>7}  tokens/s of the whole job", *rows])


def save_policy(policy: Policy, path: str, comment: str) -> None:
    """Write it whole or not at all."""
    target = Path(path)
    part = target.with_name(f".{target.name}.part")
    try:
        policy.save(part, comment)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def make_parser() -> argparse.ArgumentParser:
    """The flags; those of a policy are fields that stay as they are."""
    parser = argparse.ArgumentParser(
        prog="python -m flexgen.tune",
        description="Find the best policy for a job, with trials, and write it.",
    )
    add = parser.add_argument
    add("--model", default="demo", help="demo, a directory, a hub id or a known OPT name (default: demo)")
    add("--weights", choices=("checkpoint", "dummy"), default="checkpoint", help="dummy: random ones")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, emulated:memory=1GiB,link=8GiB,disk=2GiB")
    add("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    add("--offload-dir", metavar="DIR", help="where the disk tier lives (default: a temporary directory)")
    for name in ("prompt_len", "gen_len", "num_prompts"):
        usual, what = getattr(USUAL, name), name.replace("_", "-")
        add(f"--{what}", type=count, default=usual, help=f"of the job (default: {usual})")
    add("--top", type=count, default=3, metavar="N", help="candidates to try in a round (default: 3)")
    add("--rounds", type=count, default=3, help="rounds of trials at most (default: 3)")
    add("--repeats", type=count, default=3, help="runs of each candidate (default: 3)")
    add("--trial-seconds", type=float, default=10.0, metavar="S", help="of one run, about (default: 10)")
    add("--seed", type=int, default=0, help="of the ids")
    add("-o", "--output", metavar="FILE", help="write the best policy to FILE")
    add("--hardware", metavar="NAME", help="another machine: a preset or a file NAME.toml; --simulate-only")
    add("--simulate-only", action="store_true", help="search only, and run nothing")
    add("--save-hardware", metavar="FILE", help="write the machine's figures, as corrected, to FILE")
    add("--frontier", metavar="FILE.png", help="draw throughput over latency (needs matplotlib)")
    add("--json", metavar="FILE", help="append what was found to FILE as a line of JSON")
    add_policy_flags(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
