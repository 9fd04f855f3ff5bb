"""One call of a model runs at a time, in the process that opened it, until the model is closed."""

from __future__ import annotations

import _thread
import os
import threading

from flexgen.errors import RequestError

_OWN_THREADS = "flexgen-"


class InUse:
    """Held by the call that runs: slots and lanes serve one at a time."""

    def __init__(self) -> None:
        self._owner: object = None  # the call that runs
        self._by: int | None = None  # its thread
        self._running = _thread.allocate_lock()  # held while it runs
        self._lock = _thread.allocate_lock()
        self._closed = False
        self._process = os.getpid()

    @property
    def inherited(self) -> bool:
        """Whether this process is a fork of the one that opened the model, and so has none of its threads."""
        return os.getpid() != self._process

    def begin(self, owner: object) -> None:
        """The call `owner` begins, unless it has already. Raises RequestError while another one runs, and as
        `refuse_closed` does."""
        self.refuse_closed()
        here = threading.get_ident()
        running = _thread.allocate_lock()
        running.acquire()
        with self._lock:
            self.refuse_closed()
            if self._owner is owner:
                return
            if self._owner is not None:
                raise RequestError(
                    "another call of this model is still running: take all that its stream has, or close the stream"
                )
            # No calls here: Python handles signals only at calls and jumps, so all of it happens or nothing.
            self._owner = owner
            self._by = here
            self._running = running

    def end(self, owner: object) -> None:
        """The call `owner` is over; nothing where it is not the one that runs."""
        if self.inherited:
            return
        with self._lock:
            if self._owner is owner:
                self._owner = None
                self._by = None
                self._running.release()

    def check(self) -> None:
        """Raise RequestError where the model is being closed, and in a process that was forked from within the call:
        the call must end, and does before its next step."""
        if self.inherited:
            self.refuse_closed()
        if self._closed:
            raise RequestError("this model was closed by another thread while the call ran")

    def refuse_closed(self) -> None:
        """Raise RequestError once the model is closed, and in a process that was forked after it was opened."""
        if self.inherited:
            raise RequestError(
                f"this model was opened by process {self._process}, and process {os.getpid()} is a fork of it: the "
                "threads that serve the model are not copied by a fork. Open the model in the child with OptLM(...), "
                "or start workers with multiprocessing's 'spawn' method and open it there"
            )
        if self._closed:
            raise RequestError("this model is closed, its weights are gone; open it again with OptLM(...)")

    def refuse_inside(self) -> None:
        """Raise RequestError in the thread of a call and in those that work for it: they cannot wait for its end."""
        here = threading.current_thread()
        inside = here.ident == self._by or here.name.startswith(_OWN_THREADS)
        if self._owner is not None and inside:
            raise RequestError(
                "close() was called from within a call of this model, by what it calls for each token: end the call "
                "first, by raising an exception, and close the model then"
            )

    def close(self) -> None:
        """End the call that runs, and wait for that; none begins any more."""
        self._closed = True
        with self._lock:
            running = self._running
        raised: BaseException | None = None
        while raised is None or running.locked():
            try:
                with running:
                    break
            except BaseException as error:  # Ctrl-C: what the call uses must not be freed before it has ended
                raised = error
        if raised is not None:
            raise raised
