"""`python -m flexgen.batch`: continue every prompt of a file; an interrupted job can resume.

    python -m flexgen.batch prompts.txt answers.jsonl --model DIR --max-tokens 64

Answers are written in the order of the prompts, one line of JSON each. If the command is interrupted, run the same
command again: it resumes after the last saved answers, and the result is that of an uninterrupted run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from flexgen.cli.answers import Answers
from flexgen.cli.flags import add_model_flags, add_policy_flags, count, print_stderr, read_policy, run
from flexgen.cli.help import HelpFormatter
from flexgen.cli.prompts import MAX_TOKENS, OPTIONS, PromptLine, at_line, encoded, read_prompts
from flexgen.cli.sampling import add_sampling_flags, check_sampling_flags
from flexgen.engine.model import OptLM
from flexgen.engine.row_options import RowOptions, check_options
from flexgen.engine.text import load_tokenizer
from flexgen.errors import FlexGenError, RequestError, shown
from flexgen.models import ModelSpec, open_model
from flexgen.policy import Auto, Policy
from flexgen.runtime.request import check_room, check_whole
from flexgen.runtime.sampler import check_seed
from flexgen.schedule.orders import ORDERS, unknown_order
from flexgen.units import LARGEST_COUNT, format_seconds
from flexgen.workload import Workload

_SEED_BITS = 64
_PROMPTS_OF_A_CALL = 1 << 14
"""A call keeps the ids of its prompts and answers in memory: 134 MB for texts of 1,024 tokens."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    return run(make_parser(), batch, argv)


def batch(args: argparse.Namespace) -> None:
    """Read the prompts, find those that are answered already, and answer the others."""
    check_sampling_flags(args)
    policy = read_policy(args)
    job = read_job(args)
    with Answers(args.answers, job.about, job.fields, args.file_mode) as answers:
        if answers.complete:
            print(
                f"{args.answers} already contains the answers to all {answers.total} prompts; nothing to do"
            )
            return
        if answers.run:
            print_stderr(
                f"{args.answers} contains the answers to {answers.count} of {answers.total} prompts; resuming"
            )
        _answer(args, job, answers, policy)


@dataclass(frozen=True)
class Job:
    """The fields of each prompt, its ids, its options and the maximum number of its new tokens.

    about: everything that the answers depend on, by name.
    """

    fields: Sequence[dict[str, Any]]
    ids: Sequence[Sequence[int]]
    options: Sequence[RowOptions]
    counts: Sequence[int]
    about: dict[str, Any]


def read_job(args: argparse.Namespace) -> Job:
    """The job that the arguments describe.

    Raises RequestError for an invalid prompt, and ModelError for a model without a tokenizer. No weights are loaded.
    """
    lines = read_prompts(args.prompts)
    spec, checkpoint = open_model(args.model)
    tokenizer = load_tokenizer(checkpoint.directory, spec.name)
    ids, options, counts = [], list[RowOptions](), list[int]()
    for line in lines:
        try:
            ids.append(encoded(tokenizer, line, args.special_tokens))
            own, most = _options(line, args.max_tokens)
            options.append(own)
            counts.append(most)
            _check(spec, ids[-1], most)
        except FlexGenError as error:  # from the encoding or the chat template
            raise at_line(args.prompts, line.number, error) from None
    fields = [line.fields for line in lines]
    about = {
        "prompts": _digest(fields),
        "tokens of the prompts": _digest(ids),
        "weights or configuration of the model": _digest(
            [repr(replace(spec, name="")), checkpoint.fingerprint]
        ),
        "--dtype": args.dtype,
        "--max-tokens": args.max_tokens,
        "--temperature": args.temperature,
        "--top-k": args.top_k,
        "--top-p": args.top_p,
        "--seed": args.seed,
        "--stop": args.stop,
    }
    return Job(fields, ids, options, counts, about)


def _options(line: PromptLine, most: int) -> tuple[RowOptions, int]:
    """The options of a prompt, and the maximum number of its new tokens; `most` if it has none."""
    given = line.fields.get(OPTIONS, {})
    own = {name: given[name] for name in given if name != MAX_TOKENS} if isinstance(given, dict) else given
    check_options(own)
    most = given.get(MAX_TOKENS, most)
    check_whole(MAX_TOKENS, most, 1, LARGEST_COUNT)
    return own, most


def _check(spec: ModelSpec, ids: Sequence[int], max_tokens: int) -> None:
    if not ids:
        raise RequestError("the tokenizer returns no ids for the prompt; remove it")
    check_room(spec, "the prompt", len(ids), max_tokens)


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()[:32]


def _run_before(answers: Answers) -> tuple[Policy, str | None, int] | None:
    """Policy, order and seed of the answered part, or None without one. Raises RequestError for damaged values."""
    if answers.run is None:
        return None
    try:
        policy, order, seed = (
            Policy.from_dict(answers.run["policy"]),
            answers.run["order"],
            answers.run["seed"],
        )
        if order is not None and order not in ORDERS:
            raise ValueError(unknown_order(order))
        if seed is None:
            raise ValueError("it has no seed")
        check_seed(seed)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise RequestError(
            f"{answers.job_path} is damaged ({type(error).__name__}: {error}). Choose another output file, or remove "
            f"it and {answers.path.name} to start over"
        ) from None
    return policy, order, seed


def _answer(args: argparse.Namespace, job: Job, answers: Answers, policy: Policy | Auto) -> None:
    seed, order = args.seed, args.order
    if before := _run_before(answers):
        before_policy, before_order, before_seed = before
        seed = before_seed if seed is None else seed
        if isinstance(policy, Auto):
            # A new search could find another policy, because other memory is free now.
            policy, order = before_policy, order or before_order
    elif isinstance(policy, Auto):
        policy = replace(policy, once=True)  # the policy must not depend on where the job is interrupted
    if seed is None:
        seed = secrets.randbits(_SEED_BITS)
    with OptLM(
        args.model,
        policy,
        workload=Workload(max(map(len, job.ids)), max(job.counts), len(job.ids)),
        device=args.device,
        dtype=args.dtype,
        offload_dir=args.offload_dir,
        fast_start=args.fast_start,
        order=order,
    ) as model:
        if model.auto is not None:
            order = model.auto.opened.order
        run = {"policy": model.policy.to_dict(), "order": order, "seed": seed}
        if answers.run not in (None, run):
            print_stderr(
                "the policy has changed: with a half-precision dtype, later answers may differ by rounding"
            )
        answers.begin(run)
        begun, new_tokens, first = time.perf_counter(), 0, answers.count
        while not answers.complete:
            _answer_some(args, job, answers, model, seed)
            assert model.stats is not None
            new_tokens += model.stats.new_tokens
    seconds = time.perf_counter() - begun
    print(
        f"{args.answers}: {answers.total - first} prompts answered, {new_tokens} new tokens in "
        f"{format_seconds(seconds)} ({new_tokens / seconds:.4g} tokens/s)"
    )


def _answer_some(args: argparse.Namespace, job: Job, answers: Answers, model: OptLM, seed: int) -> None:
    """Answer the next prompts in one call, and save answers in order as soon as `--save-every` blocks have them."""
    save_every = args.save_every * model.policy.block_size
    rows = range(answers.count, min(answers.count + max(_PROMPTS_OF_A_CALL, save_every), answers.total))
    texts = model.stream_texts(
        [job.ids[row] for row in rows],
        [job.counts[row] for row in rows],
        stop=args.stop,
        options=[job.options[row] for row in rows],
        sort_within=save_every,
        do_sample=args.temperature > 0,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=seed,
        first_row=rows.start,
    )
    with texts:
        early: dict[int, str] = {}  # answers that are not saved yet, because one before them is missing
        ready: list[str] = []
        for number, text in texts:
            early[number] = text
            while (following := answers.count - rows.start + len(ready)) in early:
                ready.append(early.pop(following))
            if len(ready) >= save_every or (ready and following == len(rows)):
                answers.save(ready)
                ready = []
                print_stderr(f"{answers.count} of {answers.total} prompts answered")


def file_mode(text: str) -> int:
    """Parse permissions in octal, for argparse. The owner must be able to read and write, to resume."""
    if not re.fullmatch("0?[0-7]{3}", text) or int(text, 8) & 0o600 != 0o600:
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is not a mode; write three octal digits that let you read and write, such as 600 or 644"
        )
    return int(text, 8)


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="python -m flexgen.batch",
        formatter_class=HelpFormatter,
        description="Continue every prompt of a file. To resume an interrupted job, run the same command again.",
    )
    add = parser.add_argument
    add(
        "prompts",
        metavar="PROMPTS",
        help="file with one prompt per line, or JSON if its suffix is .jsonl, .ndjson or .json",
    )
    add(
        "answers",
        metavar="ANSWERS",
        help='output file: one line of JSON per prompt, in order, with "completion"',
    )
    add(
        "--save-every",
        type=count,
        default=4,
        metavar="BLOCKS",
        help="save answers after this number of blocks; prompts are sorted by length within this number",
    )
    add(
        "--file-mode",
        type=file_mode,
        default="600",
        metavar="OCTAL",
        help="permissions of new output files, such as 644",
    )
    add_model_flags(parser)
    add_sampling_flags(parser)
    add_policy_flags(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
