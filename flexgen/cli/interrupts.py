"""Handling of Ctrl-C while a command still imports its modules: exit with status 130 and no traceback."""

from __future__ import annotations

# Import as little as possible here: until the handler is set, Ctrl-C prints a traceback.
import os
import signal
import sys

_PACKAGES = ("flexgen", "flexllmgen")
_SCRIPTS = ("flexgen",)
_WITH_VALUE = "WX"
"""Options of the interpreter that take a value, in the same argument or the next one."""


def end_quietly_while_starting() -> None:
    """If this process is one of flexgen's commands, make SIGINT exit at once with status 130.

    Imports take seconds and hold no resources that must be freed. Has no effect in other programs, in other threads,
    or if the parent process set SIGINT to be ignored. `handle_as_usual` restores the default handler.
    """
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or not _is_command(sys.orig_argv):
        return
    try:
        signal.signal(signal.SIGINT, _end)
    except ValueError:
        return  # only the main thread can set handlers


def handle_as_usual() -> None:
    """Make SIGINT raise KeyboardInterrupt again, because the command has begun."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: object) -> None:
    os._exit(128 + number)


def _is_command(argv: list[str]) -> bool:
    """Whether the interpreter's arguments are `-m flexgen...` or the path of a console script."""
    words = iter(argv[1:])
    for word in words:
        if word == "--check-hash-based-pycs":
            next(words, "")
        elif not word.startswith("-"):
            return os.path.basename(word) in _SCRIPTS
        elif not word.startswith("--"):
            # Letters may share an argument, such as `-um`; a letter that takes a value is the last.
            for place, letter in enumerate(word[1:], start=2):
                if letter not in "cm" + _WITH_VALUE:
                    continue
                value = word[place:] or next(words, "")
                if letter in "cm":
                    return letter == "m" and value.partition(".")[0] in _PACKAGES
                break
    return False
