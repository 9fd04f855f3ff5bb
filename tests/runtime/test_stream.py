"""A stream passes on the results of its run, and ends the run when its reader is gone."""

from __future__ import annotations

import gc
import itertools
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from flexgen.memory import threads
from flexgen.runtime.stream import Stream, StreamWriter

PATIENCE = 20
"""Seconds that a test waits for what must happen before it fails."""


def running() -> bool:
    return any(thread.name == "flexgen-stream" for thread in threading.enumerate())


def endless(writer: StreamWriter[int]) -> None:
    for number in itertools.count():
        writer.check()
        if number < 3:
            writer.put(number)


def test_items_come_in_order_and_then_it_ends() -> None:
    stream = Stream(lambda writer: [writer.put(n) for n in range(5)])
    assert list(stream) == [0, 1, 2, 3, 4]
    assert list(stream) == [] and not running()


def test_an_error_comes_after_earlier_rows() -> None:
    error = ValueError("the cable is out")

    def run(writer: StreamWriter[int]) -> None:
        writer.put(7)
        raise error

    stream = Stream(run)
    assert next(stream) == 7
    with pytest.raises(ValueError) as raised:
        next(stream)
    assert raised.value is error
    assert list(stream) == [] and not running()


@pytest.mark.parametrize("way", ["close", "with", "drop"])
def test_a_run_that_is_left_ends(way: str) -> None:
    stream: Stream[int] | None = Stream(endless)
    assert stream is not None and next(stream) == 0
    if way == "close":
        stream.close()
    elif way == "with":
        with stream:
            assert next(stream) == 1
    else:
        stream = None
        gc.collect()
    assert not running()
    assert stream is None or list(stream) == []


def test_a_stream_that_is_dropped_in_the_thread_of_its_run_waits_for_nothing() -> None:
    # The garbage collector runs in whatever thread it likes.
    made, closed, streams, errors = (
        threading.Event(),
        threading.Event(),
        list[Stream[int]](),
        list[Exception](),
    )

    def run(writer: StreamWriter[int]) -> None:
        made.wait(60)
        try:
            streams[0].close()
        except RuntimeError as error:
            errors.append(error)
        closed.set()
        writer.check()

    streams.append(Stream(run))
    made.set()
    assert closed.wait(60) and not errors
    assert list(streams[0]) == []


class Interrupted:
    """A queue at which Ctrl-C is pressed."""

    def put(self, item: object) -> None:
        pass

    def get(self) -> None:
        raise KeyboardInterrupt


def test_ctrl_c_while_waiting_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(endless)
    monkeypatch.setattr(stream._writer, "queue", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert not running()


def test_a_run_that_begins_after_its_stream_was_interrupted_does_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C comes when the system has made the thread and it has not begun: nobody waits for it any more."""
    late: list[threading.Thread] = []
    begun: list[StreamWriter[int]] = []

    def interrupted(thread: threading.Thread) -> None:
        late.append(thread)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("flexgen.memory.threads.start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Stream(begun.append)
    late[0].start()
    late[0].join()
    assert not late[0].is_alive() and not begun


def test_ctrl_c_at_any_line_while_a_stream_begins_ends_its_run() -> None:
    """The error is kept, as debuggers and `sys.last_exc` do: its traceback holds the stream, which is not dropped.

    At lines of the stream and of `threads.start`, and when that returns. Not within Python's own modules: at a line
    that ends a `with`, where no signal is handled, an error would leave a lock taken.
    """
    begin, kept, ended = Stream.__init__.__code__, list[BaseException](), list[threading.Event]()
    interrupted = {begin, Stream.close.__code__, threads.start.__code__}

    def run(writer: StreamWriter[int]) -> None:
        ended.append(event := threading.Event())
        try:
            while True:
                writer.check()
        finally:
            event.set()

    for lines in itertools.count():
        left, begun = lines, False

        def interrupt(frame: FrameType, event: str, arg: object) -> Callable[..., Any] | None:
            nonlocal left, begun
            begun = begun or frame.f_code is begin
            if not begun or frame.f_code not in interrupted:
                return None
            if event == "line" or frame.f_code is not begin:
                left -= 1
                if left < 0:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return interrupt

        before = sys.gettrace()
        sys.settrace(interrupt)
        try:
            stream = Stream(run)
        except KeyboardInterrupt as error:
            kept.append(error)
        else:
            break
        finally:
            sys.settrace(before)
    stream.close()
    assert len(kept) > 5 and ended
    assert all(event.wait(PATIENCE) for event in ended), "a run continues after its stream was interrupted"
