"""`python -m flexgen.bench`: measure the throughput of a policy.

    python -m flexgen.bench --policy policies/demo.toml
    python -m flexgen.bench --model opt-1.3b --weights dummy --policy FILE --prompt-len 512 --gen-len 32

Prints a card, and writes a line of JSON and a trace on request. With the embedded model it also prints generated
answers next to the correct ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flexgen import demo
from flexgen.cli.flags import (
    OutputFile,
    add_mean_new_flag,
    add_model_flags,
    add_policy_flags,
    add_prefix_flag,
    count,
    read_policy,
    run,
)
from flexgen.cli.help import HelpFormatter
from flexgen.engine import OptLM, scoring
from flexgen.engine.auto import USUAL, known_machine, this_machine
from flexgen.errors import CapacityError, RequestError
from flexgen.policy import Policy
from flexgen.results.report import Report
from flexgen.runtime.debug import tokens_to_run
from flexgen.tuning.trial import warm_up, with_prediction
from flexgen.workload import Workload

_DEMO_GEN_LEN = 24
_DEMO_PROMPTS = 1024
_SCORED_RECORDS = 256


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    return run(make_parser(), bench, argv)


def bench(args: argparse.Namespace) -> Report:
    """Open the model, run the job and print its card."""
    policy = read_policy(args)
    records = make_records(args)
    workload = asked_workload(args, records)
    # Raises before weights are loaded.
    tokens_to_run(workload.gen_len, args.cut_gen_len, None, projected=True)
    if args.cut_gen_len is not None and args.mean_new is not None:
        raise RequestError(
            f"--cut-gen-len is {args.cut_gen_len} and --mean-new is {args.mean_new:g}: the time of a run whose rows "
            "end early cannot be projected from its first tokens. Leave out one of the two"
        )
    hardware = known_machine(args.device, args.offload_dir) if isinstance(policy, Policy) else None
    if args.predict:
        hardware = this_machine(args.device, args.offload_dir)
    with OptLM(
        args.model,
        policy,
        workload=workload,
        device=args.device,
        dtype=args.dtype,
        offload_dir=args.offload_dir,
        fast_start=args.fast_start,
        weights=args.weights,
        order=args.order,
    ) as model:
        job = make_job(model, args, records)
        if args.warm_up:
            warm_up(model, job.prompts, job.gen_len)
        ids, report = model.generate(
            job.prompts,
            workload_of(job, args).answers(),
            stop=(),
            cut_gen_len=args.cut_gen_len,
            seed=args.seed,
            stats=True,
        )
        if args.trace:
            assert model.stats is not None
            model.stats.timing.trace.save(args.trace, model.layer_names)
        bound = args.bound and args.mean_new is None  # the lanes are timed for rows that do not end early
        phases = model.lane_seconds(job.prompts, job.gen_len) if bound else {}
        perplexity = answer_perplexity(model, job)
        report = dataclasses.replace(report, model=str(args.model), phases=phases, perplexity=perplexity)
        hardware = model.auto.job.hardware if model.auto else hardware
        report = with_prediction(report, model.spec, hardware) if hardware else report
    if job.records:
        print(answers(job, ids))
    print(report.card())
    if args.json:
        args.json.append(report.to_json())
    return report


@dataclass(frozen=True)
class Records:
    """The questions for the embedded model, and its prompts as ids."""

    records: Sequence[demo.Record]
    prompts: Sequence[np.ndarray]
    tokenizer: Any


@dataclass(frozen=True)
class Job:
    """The prompts to run, and their records if the answers are known."""

    prompts: Sequence[np.ndarray]
    gen_len: int
    records: Sequence[demo.Record] = ()
    tokenizer: Any = None

    @property
    def prompt_len(self) -> int:
        return max(map(len, self.prompts))


def make_records(args: argparse.Namespace) -> Records | None:
    """Record tasks for the embedded model; None for other models, and if a prompt length is given."""
    if args.model != "demo" or args.weights != "checkpoint" or args.prompt_len is not None:
        return None
    from transformers import AutoTokenizer  # takes seconds, and only the embedded model needs it

    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    records = demo.records(args.num_prompts or _DEMO_PROMPTS, seed=args.seed)
    prompts = [np.array(tokenizer(record.prompt).input_ids, dtype=np.int64) for record in records]
    return Records(records, prompts, tokenizer)


def asked_workload(args: argparse.Namespace, records: Records | None) -> Workload:
    """The workload for the search of a policy."""
    mean = args.mean_new
    if records:
        longest, gen_len = max(map(len, records.prompts)), args.gen_len or _DEMO_GEN_LEN
        return Workload(longest, gen_len, len(records.prompts), mean_new=mean)
    lengths = args.prompt_len or USUAL.prompt_len, args.gen_len or USUAL.gen_len
    return Workload(*lengths, args.num_prompts or USUAL.num_prompts, args.prefix_len, mean)


def workload_of(job: Job, args: argparse.Namespace) -> Workload:
    """The workload of the job that runs."""
    return Workload(job.prompt_len, job.gen_len, len(job.prompts), mean_new=args.mean_new)


def make_job(model: OptLM, args: argparse.Namespace, records: Records | None) -> Job:
    """The records, or random ids: one block of prompts unless a number is given."""
    if records:
        prompts = records.prompts
        return Job(prompts, args.gen_len or _DEMO_GEN_LEN, records.records, records.tokenizer)
    asked = asked_workload(args, None)
    random = np.random.default_rng(args.seed)
    ids = random.integers(
        0, model.spec.vocab_size, size=(args.num_prompts or model.policy.block_size, asked.prompt_len)
    )
    ids[:, : asked.prefix] = ids[0, : asked.prefix]
    return Job(list(ids), asked.gen_len)


def answers(job: Job, ids: np.ndarray, shown: int = 2) -> str:
    """Some generated answers next to the correct ones, and the share of correct answers by task."""
    completions = [job.tokenizer.decode(row[job.prompt_len :], skip_special_tokens=True) for row in ids]
    lines = []
    seen: dict[str, int] = {}
    for record, completion in zip(job.records, completions, strict=True):
        seen[record.task] = seen.get(record.task, 0) + 1
        if seen[record.task] > shown:
            continue
        given = completion.partition("\n")[0].strip()
        mark = (
            "correct" if demo.is_right(record, completion) else f"wrong, expected {record.answer.strip()!r}"
        )
        lines.append(f"{record.prompt} {given}    [{mark}]\n")
    right = demo.accuracy(job.records, completions)
    shares = ", ".join(f"{task} {share:.1%}" for task, share in right.items())
    return "\n".join([*lines, f"correct answers: {shares}"])


def answer_perplexity(model: OptLM, job: Job) -> float | None:
    """Perplexity of the correct answers to the first records of the job, each given its prompt.

    None if no answers are known, or if there is no memory for the logits of a whole text: a completed run must not
    fail here.
    """
    if not job.records:
        return None
    pairs = list(zip(job.prompts, job.records, strict=True))[:_SCORED_RECORDS]
    try:
        scores = scoring.score(model.forward, [job.tokenizer(record.text).input_ids for _, record in pairs])
    except CapacityError:
        return None
    # The ids of a text begin with those of its prompt; the first id of a text has no score.
    return scoring.perplexity(
        found[len(prompt) - 1 :] for found, (prompt, _) in zip(scores, pairs, strict=True)
    )


def make_parser() -> argparse.ArgumentParser:
    """The flags. Those of FlexGen's own benchmark override a policy file."""
    parser = argparse.ArgumentParser(
        prog="python -m flexgen.bench",
        formatter_class=HelpFormatter,
        description="Measure the throughput of a policy.",
    )
    add = parser.add_argument
    add_model_flags(parser, dummy=True)
    add(
        "--prompt-len",
        type=count,
        metavar="N",
        help="tokens of each prompt, as random ids (default: 512; the demo model gets records of its tasks)",
    )
    add_prefix_flag(parser)
    add("--gen-len", type=count, metavar="N", help="new tokens of each prompt (default: 32; demo: 24)")
    add("--num-prompts", type=count, metavar="N", help="number of prompts (default: one block; demo: 1024)")
    add_mean_new_flag(parser)
    add("--cut-gen-len", type=count, metavar="N", help="run only N tokens and extrapolate the decode time")
    add("--seed", type=int, default=0, help="seed of the prompts and records")
    add("--json", type=OutputFile, metavar="FILE", help="append the results to FILE as a line of JSON")
    add(
        "--trace",
        type=OutputFile,
        metavar="FILE",
        help="write a timeline of all steps by lane, for chrome://tracing or ui.perfetto.dev",
    )
    add(
        "--no-warm-up",
        dest="warm_up",
        action="store_false",
        help="skip the warm-up (two tokens of each block shape); the times then include compilation and loading",
    )
    add(
        "--no-bound",
        dest="bound",
        action="store_false",
        help="skip the bound, which times each lane alone",
    )
    add("--predict", action="store_true", help="also predict the run; measures the machine if necessary")
    add_policy_flags(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
