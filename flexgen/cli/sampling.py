"""Sampling and stop flags, shared by the commands that generate text."""

from __future__ import annotations

import argparse
import re

from flexgen.engine.text import stop_strings
from flexgen.runtime.request import check_whole
from flexgen.runtime.sampler import check_sampling, check_seed


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags to `parser`."""
    add = parser.add_argument
    add("--max-tokens", type=int, default=128, metavar="N", help="maximum number of new tokens per prompt")
    add(
        "--temperature",
        type=float,
        default=1.0,
        help="temperature of sampling; 0: always take the most probable token",
    )
    add(
        "--top-k",
        type=int,
        default=0,
        metavar="K",
        help="sample from the K most probable tokens; 0: from all",
    )
    add(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the most probable tokens whose probabilities sum to P; 1: from all",
    )
    add("--seed", type=int, help="seed of the sampling (default: a new one each time)")
    add(
        "--stop",
        action="append",
        default=[],
        type=unescaped,
        metavar="TEXT",
        help=r"stop before this text; \n, \t and \\ mean newline, tab and backslash; may be repeated",
    )
    add(
        "--no-special-tokens",
        dest="special_tokens",
        action="store_false",
        help="do not add the tokenizer's special tokens, such as BOS, to prompts",
    )


_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\r": "\r", r"\\": "\\"}


def unescaped(text: str) -> str:
    """The text with its escape sequences replaced. A shell passes `'\\n'` on as a backslash and an n."""
    return re.sub(r"\\[ntr\\]", lambda found: _ESCAPES[found[0]], text)


def check_sampling_flags(args: argparse.Namespace) -> None:
    """Raise RequestError for invalid flags, before the model is opened."""
    check_whole("--max-tokens", args.max_tokens, 1)
    check_sampling(args.temperature, args.top_k, args.top_p)
    check_seed(args.seed)
    stop_strings(args.stop)
