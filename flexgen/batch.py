"""`python -m flexgen.batch`: continue every prompt of a file, and go on where it ended if it is cut off.

    python -m flexgen.batch prompts.txt answers.jsonl --model DIR --max-tokens 64

Answers come in the order of the prompts, a line of JSON each. Whatever ends the command, the same command goes on
from the last answers that were saved, with what an undisturbed run would have given.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flexgen.answers import Answers
from flexgen.engine import OptLM
from flexgen.errors import RequestError
from flexgen.flags import add_model_flags, add_policy_flags, count, read_policy, run, tell
from flexgen.models import ModelSpec, open_model
from flexgen.policy import Auto, Policy
from flexgen.runtime.request import check_room
from flexgen.sampling_flags import add_sampling_flags, check_sampling_flags
from flexgen.text import encode, load_tokenizer
from flexgen.units import format_seconds
from flexgen.workload import Workload

_PROMPT, _COMPLETION = "prompt", "completion"
_SEEDS = 1 << 64


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run(make_parser(), batch, argv)


def batch(args: argparse.Namespace) -> None:
    """Read the prompts, find what is answered already, answer the rest."""
    check_sampling_flags(args)
    policy = read_policy(args)
    job = read_job(args)
    with Answers(args.answers, job.about, len(job.ids)) as answers:
        if answers.complete:
            print(
                f"{args.answers} has the answers of all {answers.total} prompts; there is nothing left to do"
            )
            return
        if answers.run:
            tell(f"{args.answers} has the answers of {answers.count} of {answers.total} prompts; going on")
        _answer(args, job, answers, policy)


@dataclass(frozen=True)
class Job:
    """The lines of the prompts' file, as fields, their prompts as ids, and what the answers depend on, by name."""

    lines: Sequence[dict[str, Any]]
    ids: Sequence[Sequence[int]]
    about: dict[str, Any]


def read_job(args: argparse.Namespace) -> Job:
    """Raises RequestError for what cannot be served, before weights are loaded, and ModelError for a model without
    a tokenizer."""
    lines = read_prompts(args.prompts)
    spec, checkpoint = open_model(args.model)
    tokenizer = load_tokenizer(checkpoint.directory, spec.name)
    ids = []
    for number, fields in enumerate(lines, 1):
        ids.append(_of_line(args.prompts, number, lambda text: encode(tokenizer, text), fields[_PROMPT]))
        _of_line(args.prompts, number, lambda row: _check(spec, row, args.max_tokens), ids[-1])
    about = {
        "prompts": _digest(lines),
        "tokens of the prompts": _digest(ids),
        "weights or configuration of the model": _digest([repr(replace(spec, name="")), checkpoint.identity]),
        "--dtype": args.dtype,
        "--max-tokens": args.max_tokens,
        "--temperature": args.temperature,
        "--top-k": args.top_k,
        "--top-p": args.top_p,
        "--seed": args.seed,
        "--stop": args.stop,
    }
    return Job(lines, ids, about)


def read_prompts(path: str) -> list[dict[str, Any]]:
    """The fields of each line: of a `.jsonl` those of its object, of other files `prompt`, the line itself.

    Raises RequestError, with the number of the line, for what is no prompt; OSError where there is no file.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text: byte {error.start} is {error.reason}") from None
    lines = text.removesuffix("\n").split("\n") if text else []
    if not lines:
        raise RequestError(f"{path} is empty; write a prompt into each line")
    parse: Callable[[str], dict[str, Any]] = _fields if Path(path).suffix == ".jsonl" else _plain
    return [_of_line(path, number, parse, line) for number, line in enumerate(lines, 1)]


def _plain(line: str) -> dict[str, Any]:
    if not line.strip():
        raise RequestError(
            "the line is empty; each line is a prompt (a .jsonl file has prompts of several lines)"
        )
    return {_PROMPT: line}


def _fields(line: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise RequestError(f"not valid JSON: {error}") from None
    if not isinstance(fields, dict) or not isinstance(fields.get(_PROMPT), str) or not fields[_PROMPT]:
        raise RequestError(f'a line must be an object with a text: {{"{_PROMPT}": "..."}}')
    if _COMPLETION in fields:
        raise RequestError(f"the field {_COMPLETION!r} is there already, where the answer is put; rename it")
    try:
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"a text is not valid Unicode: {error.reason}") from None
    return fields


def _of_line(path: str, number: int, work: Callable[[Any], Any], given: Any) -> Any:
    """Raises the RequestError of `work` with the line's number."""
    try:
        return work(given)
    except RequestError as error:
        raise RequestError(f"{path}, line {number}: {error}") from None


def _check(spec: ModelSpec, ids: Sequence[int], max_tokens: int) -> None:
    if not ids:
        raise RequestError("the tokenizer makes no ids of the prompt")
    check_room(spec, "the prompt", len(ids), max_tokens)


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()[:32]


def _answer(args: argparse.Namespace, job: Job, answers: Answers, policy: Policy | Auto) -> None:
    before = answers.run
    seed, order = args.seed, args.order
    if seed is None:
        seed = before["seed"] if before else secrets.randbits(64)
    if before and isinstance(policy, Auto):
        # Another search could find another policy, for what is free now, and with it other blocks.
        policy, order = Policy.from_dict(before["policy"]), order or before["order"]
    elif isinstance(policy, Auto):
        policy = replace(policy, once=True)  # so that the blocks are the same wherever one is cut off
    with OptLM(
        args.model,
        policy,
        workload=Workload(max(map(len, job.ids)), args.max_tokens, len(job.ids)),
        device=args.device,
        dtype=args.dtype,
        offload_dir=args.offload_dir,
        order=order,
    ) as model:
        if model.auto is not None:
            order = model.auto.opened.order
        how = {"policy": model.policy.to_dict(), "order": order, "seed": seed}
        if before and before != how:
            tell("the policy is another one from here on: in half types answers may differ by rounding")
        save_every = args.save_every * model.policy.block_size
        answers.begin(how, save_every)
        begun, new_tokens, first = time.perf_counter(), 0, answers.count
        while not answers.complete:
            rows = range(answers.count, min(answers.count + save_every, answers.total))
            texts = model.generate_text(
                [job.ids[row] for row in rows],
                args.max_tokens,
                stop=args.stop,
                do_sample=args.temperature > 0,
                temperature=args.temperature,
                top_k=args.top_k,
                top_p=args.top_p,
                seed=(seed + rows.start) % _SEEDS,
            )
            answers.save(
                [job.lines[row] | {_COMPLETION: text} for row, text in zip(rows, texts, strict=True)]
            )
            assert model.stats is not None
            new_tokens += model.stats.new_tokens
            tell(f"{answers.count} of {answers.total} prompts are answered")
    seconds = time.perf_counter() - begun
    print(
        f"{args.answers}: {answers.total - first} prompts answered, {new_tokens} new tokens in "
        f"{format_seconds(seconds)} ({new_tokens / seconds:.4g} tokens/s)"
    )


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="python -m flexgen.batch",
        description="Continue every prompt of a file. After an interruption the same command goes on.",
    )
    add = parser.add_argument
    add("prompts", metavar="PROMPTS", help='a prompt in each line; NAME.jsonl: objects with "prompt"')
    add("answers", metavar="ANSWERS", help='gets a line of JSON for each, in order, with "completion"')
    add(
        "--save-every",
        type=count,
        default=4,
        metavar="BLOCKS",
        help="blocks that are saved together, in which prompts of like length meet (default: 4)",
    )
    add_model_flags(parser)
    add_sampling_flags(parser)
    add_policy_flags(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
