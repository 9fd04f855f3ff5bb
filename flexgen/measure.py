"""`python -m flexgen.measure`: measure this machine for predictions and searches.

    python -m flexgen.measure
    python -m flexgen.measure --device cuda --offload-dir /fast/disk --output mine.toml

Prints a `Hardware` as TOML, and caches it for later commands. It takes about a minute; keep the machine idle during
this time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from flexgen.cli.flags import DEVICES, OutputFile, run
from flexgen.cli.help import HelpFormatter
from flexgen.predict.hardware import Hardware
from flexgen.probe.measured import KIND, measured, remembered
from flexgen.user_cache import cache_folder


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    return run(make_parser(), measure, argv)


def measure(args: argparse.Namespace) -> Hardware:
    """Measure the machine, or find the cached measurement, and print or write it."""
    with tqdm(desc="measuring", unit="figure", disable=True if args.quiet else None) as bar:

        def progress(done: int, total: int, label: str) -> None:
            bar.total = total
            bar.set_postfix_str(label)
            bar.update(done - bar.n)

        hardware = measured(args.device, args.offload_dir, args.again, progress)
    if args.output:
        hardware.save(args.output)
    else:
        print(hardware.to_toml(), end="")
    if not args.quiet:
        where = [f"written to {args.output}"] if args.output else []
        if remembered(args.device, args.offload_dir):
            where.append(f"cached in {cache_folder(KIND)}")
        if where:
            print(", ".join(where), file=sys.stderr)
    return hardware


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="python -m flexgen.measure",
        formatter_class=HelpFormatter,
        description="Measure this machine: memory, links, disk, arithmetic and fixed costs.",
    )
    add: Any = parser.add_argument
    add("--device", default="auto", help=DEVICES)
    add(
        "--offload-dir",
        metavar="DIR",
        help="directory on the disk to measure (default: the system's temporary directory)",
    )
    add(
        "-o",
        "--output",
        type=OutputFile,
        metavar="FILE",
        help="write the TOML to FILE instead of printing it",
    )
    add("--again", action="store_true", help="measure again, even if there is a cached measurement")
    add("--quiet", action="store_true", help="print no progress, only the TOML")
    return parser


if __name__ == "__main__":
    sys.exit(main())
