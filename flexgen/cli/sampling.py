"""Flags for sampling and stops, shared by the commands that continue texts."""

from __future__ import annotations

import argparse
import re

from flexgen.engine.text import stop_strings
from flexgen.runtime.request import check_whole
from flexgen.runtime.sampler import check_sampling, check_seed


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Add them."""
    add = parser.add_argument
    add("--max-tokens", type=int, default=128, metavar="N", help="new tokens at most (default: 128)")
    add("--temperature", type=float, default=1.0, help="0 takes the most probable token (default: 1.0)")
    add("--top-k", type=int, default=0, metavar="K", help="draw from the K most probable ones (0: all)")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from those that make up P (1: all)")
    add("--seed", type=int, help="of what is drawn (default: another one each time)")
    add(
        "--stop",
        action="append",
        default=[],
        type=unescaped,
        metavar="TEXT",
        help=r"end before this text, in which \n, \t and \\ are a newline, a tab and a backslash; may be repeated",
    )
    add(
        "--no-special-tokens",
        dest="special_tokens",
        action="store_false",
        help="do not begin prompts with the tokenizer's special tokens, such as BOS",
    )


_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\r": "\r", r"\\": "\\"}


def unescaped(text: str) -> str:
    """The text with its escape sequences replaced: a shell passes on a backslash and an n for `'\\n'`."""
    return re.sub(r"\\[ntr\\]", lambda found: _ESCAPES[found[0]], text)


def check_sampling_flags(args: argparse.Namespace) -> None:
    """Raise RequestError for what cannot be meant, before anything is opened."""
    check_whole("--max-tokens", args.max_tokens, 1)
    check_sampling(args.temperature, args.top_k, args.top_p)
    check_seed(args.seed)
    stop_strings(args.stop)
