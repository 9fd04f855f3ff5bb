"""Dispatch modes in every thread: torch keeps them by thread, and flexgen's lanes are threads."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager


@contextlib.contextmanager
def in_every_thread(make_mode: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """The calling thread, and all threads that begin meanwhile, run under a mode of their own."""
    run = threading.Thread.run

    def run_in_mode(thread: threading.Thread) -> None:
        with make_mode():
            run(thread)

    threading.Thread.run = run_in_mode
    try:
        with make_mode():
            yield
    finally:
        threading.Thread.run = run
