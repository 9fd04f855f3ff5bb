"""`python -m flexgen.simulate`: what a policy would take on a machine that one need not have.

    python -m flexgen.simulate --model opt-30b --policy FILE --hardware t4 --prompt-len 512 --gen-len 32

Prints the card of `flexgen.bench`, on request its line of JSON and a trace, from the schedule laid out in virtual
time. No weights are read; a model that is not known by name or not on this machine needs its config.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from flexgen.cli.flags import OutputFile, add_policy_flags, count, read_policy, run
from flexgen.engine.auto import USUAL, AutoPolicy
from flexgen.models import open_model
from flexgen.policy import Auto
from flexgen.predict.job import Job
from flexgen.predict.prediction import predict_job
from flexgen.probe.measured import find_hardware
from flexgen.results.report import Report
from flexgen.workload import Workload


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run(make_parser(), simulate, argv)


def simulate(args: argparse.Namespace) -> Report:
    """Predict the job and print what it would take."""
    policy, order = read_policy(args), args.order
    spec, _ = open_model(args.model, "dummy")
    hardware = find_hardware(args.hardware, args.device, args.offload_dir)
    if isinstance(policy, Auto):
        workload = Workload(args.prompt_len, args.gen_len, args.num_prompts or USUAL.num_prompts)
        found = AutoPolicy(policy, Job.checked(spec, hardware, workload, args.dtype, order)).opened
        policy, order = found.policy, found.order
    workload = Workload(args.prompt_len, args.gen_len, args.num_prompts or policy.block_size)
    prediction = predict_job(Job.checked(spec, hardware, workload, args.dtype, order), policy, args.samples)
    report = prediction.report
    if args.trace:
        prediction.trace().save(args.trace, prediction.layer_names)
    if args.json == "-":
        print(report.to_json())
        return report
    print(report.card())
    if args.json:
        args.json.append(report.to_json())
    return report


def make_parser() -> argparse.ArgumentParser:
    """The flags: those of `flexgen.bench` that mean something without a machine."""
    parser = argparse.ArgumentParser(
        prog="python -m flexgen.simulate",
        description="Predict the throughput of a policy on a machine that one need not have.",
    )
    add = parser.add_argument
    add(
        "--hardware",
        required=True,
        metavar="NAME",
        help="a preset (t4, a100-80g, ...), a file NAME.toml, or `measured`: this machine (see flexgen.measure)",
    )
    add("--device", default="auto", help="of the measured machine (default: auto)")
    add("--offload-dir", metavar="DIR", help="of the measured machine: a directory on its disk")
    add("--model", default="demo", help="demo, a directory, a hub id or a known OPT name (default: demo)")
    add(
        "--dtype",
        default="auto",
        help="auto, float32, bfloat16 or float16, as far as the machine has figures",
    )
    add("--prompt-len", type=count, default=512, help="tokens of each prompt (default: 512)")
    add("--gen-len", type=count, default=32, help="new tokens of each prompt (default: 32)")
    add(
        "--num-prompts",
        type=count,
        help=f"prompts in all (default: one block, by auto at most {USUAL.num_prompts})",
    )
    add(
        "--samples",
        type=count,
        metavar="N",
        help="lay out N tokens of the decode instead of all; much faster, and close",
    )
    add(
        "--json",
        type=OutputFile,
        metavar="FILE",
        help="append the figures to FILE as a line of JSON; - prints that line only",
    )
    add(
        "--trace",
        type=OutputFile,
        metavar="FILE",
        help="write every step by lane, for chrome://tracing or ui.perfetto.dev",
    )
    add_policy_flags(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
