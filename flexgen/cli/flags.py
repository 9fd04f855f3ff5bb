"""How a command runs, and the flags that several commands share."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flexgen.cli.interrupts import handle_as_usual
from flexgen.errors import MOST_OF_PATH, FlexGenError, PolicyError, cut, shown
from flexgen.policy import Auto, Policy
from flexgen.schedule.orders import ORDERS
from flexgen.units import LARGEST_COUNT

AUTO = "auto"
"""The value of `--policy` that asks for a search."""


class OutputFile(str):
    """The name of a file that a command writes at its end. Use it as the `type` of a flag: `run` then checks that the
    file can be written before the command starts."""

    def append(self, line: str) -> None:
        """Append a line to the file. `-` is standard output."""
        if self == "-":
            print(line)
            return
        with open(self, "a", encoding="utf-8") as file:
            file.write(line + "\n")


def run(
    parser: argparse.ArgumentParser,
    command: Callable[[argparse.Namespace], object],
    argv: Sequence[str] | None,
) -> int:
    """Run `command` with the arguments and return the exit status. An expected error prints one line and returns 1.

    The package's log, such as the policy that was found, goes to stderr while the command runs. An output file that
    cannot be written is rejected before any work. SIGTERM ends the command like Ctrl-C, and frees its resources.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(lambda record: record.name == "flexgen" or record.levelno >= logging.WARNING)
    log = logging.getLogger("flexgen")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        handle_as_usual()
        args = parser.parse_args(argv)
        _check_written(args)
        with _freed_on_sigterm():
            command(args)
    except (FlexGenError, OSError) as error:
        print(f"{parser.prog}: {cut(str(error), 2 * MOST_OF_PATH)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    return 0


def _check_written(args: argparse.Namespace) -> None:
    """Raise OSError for a file that cannot be written. Leaves no new file behind."""
    for name, path in vars(args).items():
        if not isinstance(path, OutputFile) or path == "-":
            continue
        flag, new = f"--{name.replace('_', '-')}", not Path(path).exists()
        if not new and not stat.S_ISREG(os.stat(path).st_mode):
            if Path(path).is_dir():
                raise IsADirectoryError(f"{flag} {path} is a directory; give the name of a file")
            continue  # a device or a pipe; its reader may come later
        try:
            with open(path, "ab"):
                pass
        except OSError as error:
            raise OSError(
                f"{flag} {path} cannot be written: {error.strerror}; choose another file"
            ) from error
        if new:
            os.unlink(path)


@contextmanager
def _freed_on_sigterm() -> Iterator[None]:
    """SIGTERM raises SystemExit with the exit status that shells use for it."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread can set handlers
        yield
        return

    def end(number: int, frame: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


DEVICES = (
    "auto, cpu, cuda, cuda:1, or emulated:memory=1GiB,link=8GiB,disk=2GiB (a simulated GPU: bytes of memory, bytes/s "
    "of link and disk)"
)
"""The help text of `--device`."""


def add_model_flags(parser: argparse.ArgumentParser, dummy: bool = False) -> None:
    """Add the flags that choose the model and the device. dummy: also offer random weights."""
    add = parser.add_argument
    if dummy:
        add("--model", default="demo", help="`demo`, a directory, a GGUF file, a hub id or a known name")
        add("--weights", choices=("checkpoint", "dummy"), default="checkpoint", help="dummy: random weights")
    else:
        add("--model", default="demo", help="`demo`, a directory, a GGUF file or a hub id")
    add("--device", default="auto", help=DEVICES)
    add("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    add("--offload-dir", metavar="DIR", help="directory of the disk tier (default: a temporary directory)")
    add(
        "--fast-start",
        action="store_true",
        help="map weights in memory from files, and store converted ones in --offload-dir for later starts",
    )


def print_stderr(text: str) -> None:
    """Print a line to stderr."""
    print(text, file=sys.stderr, flush=True)


def add_policy_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--policy`, `--order` and the flags of FlexGen's own benchmark. `read_policy` reads all but the order."""
    add = parser.add_argument
    add(
        "--policy",
        metavar="FILE",
        default=AUTO,
        help="TOML file of a policy; auto: search for the best one on this machine",
    )
    add("--lossy", action="store_true", help="let the search use codecs, which round weights and cache")
    orders = ", ".join(sorted(ORDERS))
    add(
        "--order",
        choices=sorted(ORDERS),
        metavar="ORDER",
        help=f"order of the steps of a block: {orders} (default: chosen by the policy)",
    )
    flexgen = parser.add_argument_group("flags of FlexGen's benchmark; they override the policy")
    add = flexgen.add_argument
    names = ("WG", "WC", "CG", "CC", "AG", "AC")
    add(
        "--percent",
        nargs=6,
        type=float,
        metavar=names,
        help="percent of weights (GPU, CPU), cache (GPU, CPU) and activations (GPU, CPU); the rest is on disk",
    )
    add("--gpu-batch-size", type=count, metavar="N", help="prompts in a batch")
    add("--num-gpu-batches", type=count, metavar="N", help="batches in a block; they share each loaded layer")
    add(
        "--prefill-chunk",
        type=count,
        metavar="TOKENS",
        help="maximum number of tokens per prompt in one pass of the prefill",
    )
    add(
        "--prefill-rows",
        type=int,
        metavar="N",
        help="maximum number of prompts that a pass computes while other rows decode (default: 0, no limit)",
    )
    add(
        "--attn-sparsity",
        type=float,
        metavar="SHARE",
        help="share of the cached values that decoding uses, above 0, at most 1 (exact)",
    )
    add(
        "--guess",
        type=int,
        metavar="TOKENS",
        help="maximum number of guesses of next tokens that a pass of the decode also computes (default: 0)",
    )
    add(
        "--reserve-new",
        type=int,
        metavar="TOKENS",
        help="new tokens for which each row's cache is reserved, on average; 0 reserves all (default: 0)",
    )
    for name, help in (
        ("--overlap", "overlap transfers with the computation"),
        ("--sep-layer", "stream attention and MLP as separate layers"),
        ("--pin-weight", "pin host memory, so that a GPU can read it directly"),
        ("--share-prefix", "compute tokens with which all prompts begin once"),
        ("--cpu-cache-compute", "compute attention on the CPU over cache that is off the GPU"),
    ):
        add(name, type=_yes_or_no, nargs="?", const=True, metavar="BOOL", help=help)


def read_policy(args: argparse.Namespace) -> Policy | Auto:
    """The policy file with the changes of the flags; without a file, the request for a search.

    If the flags set the placement and the shape of a block, there is no search.
    """
    fixed = fixed_fields(args)
    searched = args.policy == AUTO and not fixed.keys() >= {"weights", "gpu_batch_size", "num_gpu_batches"}
    if searched:
        return Auto(fixed, args.lossy)
    if args.lossy:
        raise PolicyError(
            "--lossy lets the search choose codecs, but these flags leave nothing to search for: leave --lossy out, "
            "and set the codecs in a policy file"
        )
    return Policy(**fixed) if args.policy == AUTO else Policy.load(args.policy).replace(**fixed)


def fixed_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a policy that the flags set."""
    changes: dict[str, Any] = {}
    if args.percent:
        given = Policy.from_percent(*args.percent)
        changes = {name: getattr(given, name) for name in ("weights", "cache", "activations")}
    shape = "gpu_batch_size", "num_gpu_batches", "prefill_chunk"
    fields = "prefill_rows", "guess", "reserve_new", "overlap", "sep_layer", "pin_weight", "share_prefix"
    for name in (*shape, *fields):
        if (value := getattr(args, name)) is not None:
            changes[name] = value
    if args.cpu_cache_compute is not None:
        changes["attend_on"] = "cpu" if args.cpu_cache_compute else "gpu"
    if args.attn_sparsity is not None:
        changes["attn_sparsity"] = args.attn_sparsity
    return changes


def add_prefix_flag(parser: argparse.ArgumentParser) -> None:
    """The flag for `Workload.prefix`."""
    parser.add_argument(
        "--prefix-len",
        type=count,
        default=0,
        metavar="N",
        help="tokens with which all prompts begin, fewer than --prompt-len; they are computed once (default: 0)",
    )


def add_mean_new_flag(parser: argparse.ArgumentParser) -> None:
    """The flag for `Workload.mean_new`."""
    parser.add_argument(
        "--mean-new",
        type=float,
        metavar="N",
        help="mean new tokens of a prompt, if rows end early; at most --gen-len (default: --gen-len for all rows)",
    )


def count(text: str) -> int:
    """Parse a whole number from 1 to `LARGEST_COUNT`, for argparse."""
    digits = len(str(LARGEST_COUNT))  # Python parses at most 4300
    number = int(text) if text.isdecimal() and len(text) <= digits else 0
    if not 1 <= number <= LARGEST_COUNT:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a whole number from 1 to {LARGEST_COUNT}")
    return number


def _yes_or_no(text: str) -> bool:
    known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a boolean; write true or false")
    return known[text.lower()]
