"""Ctrl-C while a command is still importing its modules: it ends with the status of an interrupt and no traceback."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

_PACKAGES = ("flexgen", "flexllmgen")
_SCRIPTS = ("flexgen",)


def end_quietly_while_starting() -> None:
    """If this process is one of flexgen's commands, SIGINT ends it at once with status 130.

    Imports take seconds and hold nothing that has to be freed. Does nothing in other programs, in other threads, and
    where the program that started this one has SIGINT ignored. `handle_as_usual` ends it.
    """
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if usual and _is_command(sys.orig_argv) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _end)


def handle_as_usual() -> None:
    """From here on SIGINT raises KeyboardInterrupt: the command has begun."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: object) -> None:
    os._exit(128 + number)


def _is_command(argv: list[str]) -> bool:
    """Whether the interpreter's arguments are `-m flexgen...` or the path of a console script."""
    for before, word in zip(argv, argv[1:], strict=False):
        if before == "-m":
            return word.partition(".")[0] in _PACKAGES
        if not word.startswith("-"):
            return Path(word).name in _SCRIPTS
    return False
