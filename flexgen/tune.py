"""`python -m flexgen.tune`: find the best policy for a job on this machine with trial runs, and write it to a file.

    python -m flexgen.tune --model opt-30b --weights dummy --prompt-len 512 --gen-len 32 -o policies/opt-30b.toml
    python -m flexgen.tune --model opt-30b --hardware t4 --simulate-only --frontier frontier.png

It searches, runs the best candidates on a part of the job, corrects the machine's figures by the measured times, and
searches again, until the best candidate of the search has been tried.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from flexgen.cli.flags import (
    AUTO,
    OutputFile,
    add_mean_new_flag,
    add_model_flags,
    add_policy_flags,
    add_prefix_flag,
    count,
    fixed_fields,
    run,
)
from flexgen.cli.help import HelpFormatter
from flexgen.cli.prompts import at_line, encoded, read_prompts
from flexgen.engine.auto import USUAL, own_order, this_machine
from flexgen.engine.text import load_tokenizer
from flexgen.errors import FlexGenError, RequestError
from flexgen.models import ModelSpec, open_model
from flexgen.models.checkpoint import Checkpoint
from flexgen.policy import Auto, Policy
from flexgen.predict.job import Job
from flexgen.probe.measured import find_hardware
from flexgen.results.report import Report
from flexgen.search.frontier import Point, draw, find_frontier, frontier_table, plotter
from flexgen.tuning.rounds import Effort, Tuning, trials_table
from flexgen.workload import Workload

_OPENING = "model", "weights", "device", "dtype", "offload_dir", "fast_start"
"""The flags that are arguments of `OptLM`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    return run(make_parser(), tune, argv)


def tune(args: argparse.Namespace) -> None:
    """Find the best policy, then print and write it. After an interrupt, the best one so far is written."""
    if args.policy != AUTO:
        raise RequestError(
            f"--policy {args.policy}: tune searches for the policy; to fix single fields, give flags such as "
            "--gpu-batch-size"
        )
    if args.hardware and not args.simulate_only:
        raise RequestError(
            "--hardware describes another machine, where no trials can run; add --simulate-only"
        )
    if args.prompts and (args.simulate_only or args.weights == "dummy"):
        raise RequestError(
            "--prompts measures guesses in the text of the model: leave --simulate-only and --weights dummy out"
        )
    plot = plotter() if args.frontier else None
    spec, checkpoint = open_model(args.model, "dummy" if args.simulate_only else args.weights)
    prompts = read_ids(args.prompts, spec, checkpoint) if args.prompts else []
    hardware = (
        find_hardware(args.hardware, args.device, args.offload_dir)
        if args.hardware
        else this_machine(args.device, args.offload_dir)
    )
    workload = Workload(args.prompt_len, args.gen_len, args.num_prompts, args.prefix_len, args.mean_new)
    tuning = Tuning(
        Job.checked(spec, hardware, workload, args.dtype, args.order),
        Auto(fixed_fields(args), args.lossy),
        effort=Effort(args.top, args.rounds, args.repeats, args.trial_seconds, args.seed),
        opening={
            **{name: getattr(args, name) for name in _OPENING},
            "progress": False,
        },
    )
    points: list[Point] = []
    interrupted = None
    try:
        if not args.simulate_only:
            tuning.run()
        if prompts:
            tuning.try_guesses(prompts)
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
            "guesses": tuning.guesses.to_dict() if tuning.guesses else {},
        }
        args.json.append(json.dumps(found))
    if interrupted:
        raise interrupted


def read_ids(path: str, spec: ModelSpec, checkpoint: Checkpoint) -> list[list[int]]:
    """The ids of the prompts in a file. Raises RequestError for an invalid prompt, and ModelError without a
    tokenizer."""
    lines, tokenizer, ids = read_prompts(path), load_tokenizer(checkpoint.directory, spec.name), []
    for line in lines:
        try:
            ids.append(encoded(tokenizer, line))
        except FlexGenError as error:
            raise at_line(path, line.number, error) from None
    return ids


def result(args: argparse.Namespace, spec: ModelSpec, tuning: Tuning) -> tuple[Policy, str, str]:
    """The best policy, its order, and a comment for the file: machine, workload, predicted and measured speed.

    A policy file contains no order, so the comment names the order and the command that uses it.
    """
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
        f"Order: {predicted.order}{f', not the default: add --order {named} to every run' if named else ''}.",
        f"Predicted: {figures(predicted)}.",
    ]
    if best:
        lines.append(
            f"Measured: {figures(best.measured)}; projected from the median of {len(best.runs)} runs of "
            f"{best.shape}, which differ by {best.spread:.0%}."
        )
    else:
        lines.append("Measured: no run.")
    policy, guesses = candidate.policy, tuning.guesses
    if guesses:
        policy = guesses.policy
        lines.append(f"On prompts of the job: {guesses}. The other figures are without guesses.")
    return policy, predicted.order, "\n".join([*lines, f"Run it: {command(args, named)}"])


def command(args: argparse.Namespace, order: str | None) -> str:
    """The command that runs the whole job with the policy. `order`: set if it is not the default order."""
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
        "prefix-len": args.prefix_len or None,
        "gen-len": args.gen_len,
        "mean-new": args.mean_new,
        "num-prompts": args.num_prompts,
    }
    flags = (f"--{name} {shlex.quote(str(value))}" for name, value in given.items() if value is not None)
    return f"python -m flexgen.{module} {' '.join(flags)}"


def figures(report: Report) -> str:
    """The three speeds of a report."""
    return (
        f"{report.throughput_tokens_s:,.2f} tokens/s (prefill {report.prefill_tokens_s:,.1f}, "
        f"decode {report.decode_tokens_s:,.2f})"
    )


def save_policy(policy: Policy, path: str, comment: str) -> None:
    """Write the file atomically."""
    target = Path(path)
    part = target.with_name(f".{target.name}.part")
    try:
        policy.save(part, comment)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def make_parser() -> argparse.ArgumentParser:
    """The flags. The flags of a policy fix single fields of it."""
    parser = argparse.ArgumentParser(
        prog="python -m flexgen.tune",
        formatter_class=HelpFormatter,
        description="Find the best policy for a job with trial runs, and write it to a file.",
    )
    add, effort = parser.add_argument, Effort()
    add_model_flags(parser, dummy=True)
    for name, what in (
        ("prompt_len", "tokens of each prompt of the job"),
        ("gen_len", "new tokens of each prompt"),
        ("num_prompts", "prompts of the job"),
    ):
        add(f"--{name.replace('_', '-')}", type=count, default=getattr(USUAL, name), metavar="N", help=what)
    add_prefix_flag(parser)
    add_mean_new_flag(parser)
    add(
        "--prompts",
        metavar="FILE",
        help="prompts of the job, as for flexgen.batch; try guesses of next tokens on them",
    )
    add(
        "--top",
        type=count,
        default=effort.top,
        metavar="N",
        help="candidates to try in each round",
    )
    add("--rounds", type=count, default=effort.rounds, metavar="N", help="maximum number of rounds")
    add("--repeats", type=count, default=effort.repeats, metavar="N", help="runs of each candidate")
    add(
        "--trial-seconds",
        type=float,
        default=effort.trial_seconds,
        metavar="S",
        help="approximate time of one run, in seconds",
    )
    add("--seed", type=int, default=effort.seed, help="seed of the random ids")
    add("-o", "--output", type=OutputFile, metavar="FILE", help="write the best policy to FILE")
    add(
        "--hardware",
        metavar="NAME",
        help="another machine: a preset or a file NAME.toml; needs --simulate-only",
    )
    add("--simulate-only", action="store_true", help="search without trial runs")
    add(
        "--save-hardware",
        type=OutputFile,
        metavar="FILE",
        help="write the corrected description of the machine to FILE",
    )
    add(
        "--frontier",
        type=OutputFile,
        metavar="FILE.png",
        help="plot throughput over latency (needs matplotlib)",
    )
    add("--json", type=OutputFile, metavar="FILE", help="append the results to FILE as a line of JSON")
    add_policy_flags(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
