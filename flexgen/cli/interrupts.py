"""Ctrl-C while a command is still importing its modules: it ends with the status of an interrupt and no traceback."""

from __future__ import annotations

# Little is imported here: until the handler is set, Ctrl-C ends in a traceback.
import os
import signal
import sys

_PACKAGES = ("flexgen", "flexllmgen")
_SCRIPTS = ("flexgen",)
_WITH_VALUE = "WX"
"""Options of the interpreter that take a value, in the same word or the next one."""


def end_quietly_while_starting() -> None:
    """If this process is one of flexgen's commands, SIGINT ends it at once with status 130.

    Imports take seconds and hold nothing that has to be freed. Does nothing in other programs, in other threads, and
    where the program that started this one has SIGINT ignored. `handle_as_usual` ends it.
    """
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or not _is_command(sys.orig_argv):
        return
    try:
        signal.signal(signal.SIGINT, _end)
    except ValueError:
        return  # only the main thread can set handlers


def handle_as_usual() -> None:
    """From here on SIGINT raises KeyboardInterrupt: the command has begun."""
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
            # Letters may share a word, such as `-um`; a letter with a value ends it.
            for place, letter in enumerate(word[1:], start=2):
                if letter not in "cm" + _WITH_VALUE:
                    continue
                value = word[place:] or next(words, "")
                if letter in "cm":
                    return letter == "m" and value.partition(".")[0] in _PACKAGES
                break
    return False
