"""`python -m flexgen.simulate`: predict the throughput of a policy on hardware that you may not own.

    python -m flexgen.simulate --model opt-30b --policy FILE --hardware t4 --prompt-len 512 --gen-len 32

It simulates the schedule in virtual time. Prints the card of `flexgen.bench`, and writes its line of JSON and a trace
on request. No weights are read. If the model is not known by name, its config.json is needed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from flexgen.cli.flags import (
    OutputFile,
    add_mean_new_flag,
    add_policy_flags,
    add_prefix_flag,
    count,
    read_policy,
    run,
)
from flexgen.cli.help import HelpFormatter
from flexgen.engine.auto import USUAL, AutoPolicy
from flexgen.models import open_model
from flexgen.policy import Auto
from flexgen.predict.job import Job
from flexgen.predict.prediction import predict_job
from flexgen.probe.measured import find_hardware
from flexgen.results.report import Report
from flexgen.workload import Workload


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    return run(make_parser(), simulate, argv)


def simulate(args: argparse.Namespace) -> Report:
    """Predict the job and print its card."""
    policy, order = read_policy(args), args.order
    lengths = args.prompt_len, args.gen_len
    more: dict[str, Any] = {
        "prefix": args.prefix_len,
        "mean_new": args.mean_new,
        "copied": args.copied,
        "cuts": (args.common_len,) if args.common_len else (),
        "groups": args.prefix_groups,
    }
    spec, _ = open_model(args.model, "dummy")
    hardware = find_hardware(args.hardware, args.device, args.offload_dir)
    if isinstance(policy, Auto):
        workload = Workload(*lengths, args.num_prompts or USUAL.num_prompts, **more)
        found = AutoPolicy(policy, Job.checked(spec, hardware, workload, args.dtype, order)).opened
        policy, order = found.policy, found.order
    workload = Workload(*lengths, args.num_prompts or policy.block_size, **more)
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
    """The flags: those of `flexgen.bench` that apply without a machine."""
    parser = argparse.ArgumentParser(
        prog="python -m flexgen.simulate",
        formatter_class=HelpFormatter,
        description="Predict the throughput of a policy on hardware that you may not own.",
    )
    add = parser.add_argument
    add(
        "--hardware",
        required=True,
        metavar="NAME",
        help="preset (t4, a100-80g, ...), file NAME.toml, or `measured` for this machine (see flexgen.measure)",
    )
    add("--device", default="auto", help="device, with --hardware measured")
    add("--offload-dir", metavar="DIR", help="directory on the disk, with --hardware measured")
    add("--model", default="demo", help="`demo`, a directory, a GGUF file, a hub id or a known name")
    add(
        "--dtype",
        default="auto",
        help="auto, float32, bfloat16 or float16, if the machine has figures for it",
    )
    add("--prompt-len", type=count, default=512, metavar="N", help="tokens of each prompt")
    add_prefix_flag(parser)
    add(
        "--prefix-groups",
        type=count,
        default=1,
        metavar="N",
        help="groups of equally many prompts, each with a prefix of its own of --prefix-len tokens (default: 1)",
    )
    add(
        "--common-len",
        type=count,
        default=0,
        metavar="N",
        help="tokens with which the prefixes of all groups begin, fewer than --prefix-len (default: 0)",
    )
    add("--gen-len", type=count, default=32, metavar="N", help="new tokens of each prompt")
    add_mean_new_flag(parser)
    add(
        "--copied",
        type=float,
        default=1.0,
        metavar="TOKENS",
        help="mean new tokens of a row in a pass with guesses (--guess), as the card of a run shows (default: 1)",
    )
    add(
        "--num-prompts",
        type=count,
        metavar="N",
        help=f"number of prompts (default: one block; with --policy auto at most {USUAL.num_prompts})",
    )
    add(
        "--samples",
        type=count,
        metavar="N",
        help="simulate only N tokens of the decode; much faster, and almost as exact",
    )
    add(
        "--json",
        type=OutputFile,
        metavar="FILE",
        help="append the results to FILE as a line of JSON; - prints only this line",
    )
    add(
        "--trace",
        type=OutputFile,
        metavar="FILE",
        help="write a timeline of all steps by lane, for chrome://tracing or ui.perfetto.dev",
    )
    add_policy_flags(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
