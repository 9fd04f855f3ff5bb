"""What several commands share: how one runs, and the flags for a policy, FlexGen's own among them."""

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
"""What `--policy` is without a file."""


class OutputFile(str):
    """The name of a file that a command writes when all is done: the `type` of its flag, by which `run` knows what to
    try before."""

    def append(self, line: str) -> None:
        """Write one more line, `-` shows it."""
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
    """Run `command` with the arguments; returns the exit status, 1 after one line that says what was wrong.

    What the package logs, such as the policy that was found, is shown on stderr meanwhile. A file that could not be
    written at the end is refused before any work. SIGTERM ends the command as Ctrl-C does: what it holds is freed.
    """
    told = logging.StreamHandler(sys.stderr)
    told.addFilter(lambda record: record.name == "flexgen" or record.levelno >= logging.WARNING)
    log = logging.getLogger("flexgen")
    level = log.level
    log.addHandler(told)
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
        log.removeHandler(told)
        log.setLevel(level)
    return 0


def _check_written(args: argparse.Namespace) -> None:
    """Raise OSError for a file that cannot be written. Leaves none behind that was not there."""
    for name, path in vars(args).items():
        if not isinstance(path, OutputFile) or path == "-":
            continue
        flag, new = f"--{name.replace('_', '-')}", not Path(path).exists()
        if not new and not stat.S_ISREG(os.stat(path).st_mode):
            if Path(path).is_dir():
                raise IsADirectoryError(f"{flag} {path} is a directory; name a file")
            continue  # a device or a pipe, which may have its reader later
        try:
            with open(path, "ab"):
                pass
        except OSError as error:
            raise OSError(f"{flag} {path} cannot be written: {error.strerror}; name another file") from error
        if new:
            os.unlink(path)


@contextmanager
def _freed_on_sigterm() -> Iterator[None]:
    """SIGTERM raises SystemExit with the status that a shell gives it."""
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield
        return

    def end(number: int, frame: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def add_model_flags(parser: argparse.ArgumentParser, dummy: bool = False) -> None:
    """Which model runs, and on what. dummy: what it says may mean nothing."""
    add = parser.add_argument
    if dummy:
        add("--model", default="demo", help="demo, a directory, a hub id or a known OPT name (default: demo)")
        add("--weights", choices=("checkpoint", "dummy"), default="checkpoint", help="dummy: random ones")
    else:
        add("--model", default="demo", help="demo, a directory or a hub id (default: demo)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, emulated:memory=1GiB,link=8GiB,disk=2GiB")
    add("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    add("--offload-dir", metavar="DIR", help="where the disk tier lives (default: a temporary directory)")


def tell(text: str) -> None:
    """Print a line to stderr."""
    print(text, file=sys.stderr, flush=True)


def add_policy_flags(parser: argparse.ArgumentParser) -> None:
    """`--policy`, `--order`, and the flags of FlexGen's own benchmark; `read_policy` reads all but the order."""
    add = parser.add_argument
    add(
        "--policy",
        metavar="FILE",
        default=AUTO,
        help="TOML file of the policy; auto (the default) searches for the best one here",
    )
    add("--lossy", action="store_true", help="let auto choose codecs too, which round weights and cache")
    orders = ", ".join(sorted(ORDERS))
    add(
        "--order",
        choices=sorted(ORDERS),
        metavar="ORDER",
        help=f"{orders} (default: the one the policy asks for)",
    )
    flexgen = parser.add_argument_group("flags of FlexGen's benchmark, which override the policy file")
    add = flexgen.add_argument
    names = ("WG", "WC", "CG", "CC", "AG", "AC")
    add(
        "--percent",
        nargs=6,
        type=float,
        metavar=names,
        help="of weights, cache and activations, each on GPU and CPU; the rest is on disk",
    )
    add("--gpu-batch-size", type=count, help="prompts that are computed at once")
    add("--num-gpu-batches", type=count, help="such batches that share each loaded layer")
    add(
        "--prefill-chunk",
        type=count,
        metavar="TOKENS",
        help="of each prompt that are computed at once, at most",
    )
    add("--attn-sparsity", type=float, metavar="SHARE", help="of the cached values, above 0 to 1 (exact)")
    for name, help in (
        ("--overlap", "move the next layers and batches while one is computed"),
        ("--sep-layer", "attention and MLP are layers of their own, each with its weights"),
        ("--pin-weight", "weights in host memory lie in pages that a GPU reads directly"),
        ("--cpu-cache-compute", "the CPU attends to the cache that lies there, instead of sending it"),
    ):
        add(name, type=_yes_or_no, nargs="?", const=True, metavar="BOOL", help=help)


def read_policy(args: argparse.Namespace) -> Policy | Auto:
    """The policy file, changed by the flags that were given; without a file, what is to be searched for.

    Where the flags say how weights, cache and activations lie and what a block is, nothing is searched for.
    """
    fixed = fixed_fields(args)
    searched = args.policy == AUTO and not fixed.keys() >= {"weights", "gpu_batch_size", "num_gpu_batches"}
    if searched:
        return Auto(fixed, args.lossy)
    if args.lossy:
        raise PolicyError(
            "--lossy lets a search choose codecs, and all is given here: write them into a policy file"
        )
    return Policy(**fixed) if args.policy == AUTO else Policy.load(args.policy).replace(**fixed)


def fixed_fields(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of a policy, from the flags that were given."""
    changes: dict[str, Any] = {}
    if args.percent:
        given = Policy.from_percent(*args.percent)
        changes = {name: getattr(given, name) for name in ("weights", "cache", "activations")}
    for name in ("gpu_batch_size", "num_gpu_batches", "prefill_chunk", "overlap", "sep_layer", "pin_weight"):
        if (value := getattr(args, name)) is not None:
            changes[name] = value
    if args.cpu_cache_compute is not None:
        changes["attend_on"] = "cpu" if args.cpu_cache_compute else "gpu"
    if args.attn_sparsity is not None:
        changes["attn_sparsity"] = args.attn_sparsity
    return changes


def count(text: str) -> int:
    """A whole number from 1 to `LARGEST_COUNT`, for argparse."""
    digits = len(str(LARGEST_COUNT))  # Python reads no more than 4300
    number = int(text) if text.isdecimal() and len(text) <= digits else 0
    if not 1 <= number <= LARGEST_COUNT:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a whole number from 1 to {LARGEST_COUNT}")
    return number


def _yes_or_no(text: str) -> bool:
    known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"{shown(text)} is neither true nor false")
    return known[text.lower()]
