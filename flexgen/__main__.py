"""`flexgen COMMAND ...`, or `python -m flexgen COMMAND ...`: mostly the same as `python -m flexgen.COMMAND ...`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from flexgen.cli.interrupts import handle_as_usual
from flexgen.errors import did_you_mean, shown

COMMANDS = {
    "complete": "continue a text, or chat at a prompt",
    "batch": "continue every prompt of a file; resumes after an interruption",
    "bench": "run a job and print its throughput, placement and bottleneck",
    "simulate": "predict the throughput of a job on hardware that you describe",
    "models": "list models, their sizes, and their speed on a machine",
    "measure": "measure this machine for predictions and searches",
    "tune": "find the best policy for a job with trial runs",
    "flex_opt": "the benchmark of FlexGen 0.1, with its flags",
}
"""The commands by name, with a description."""
_MODULES = {"models": "catalog"}
"""The commands that are not a module of the same name: flexgen.models is the package of the models themselves."""


def module_of(command: str) -> str:
    """The name of the module in `flexgen` that is the command."""
    return _MODULES.get(command, command)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names, and return its exit status."""
    name, *rest = [*(sys.argv[1:] if argv is None else argv), ""]
    if name in ("", "-h", "--help"):
        handle_as_usual()
        print(_usage())
        return 0
    if name not in COMMANDS:
        handle_as_usual()
        print(
            f"flexgen: {shown(name)} is not a command{did_you_mean(name, COMMANDS)}\n\n{_usage()}",
            file=sys.stderr,
        )
        return 2
    status: int = importlib.import_module(f"flexgen.{module_of(name)}").main(rest[:-1])
    return status


def _usage() -> str:
    lines = [f"  {name:<10} {about}" for name, about in COMMANDS.items()]
    return "\n".join(
        [
            "usage: flexgen COMMAND [ARGUMENTS]",
            "",
            *lines,
            "",
            "`flexgen COMMAND --help` lists the arguments of a command.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
