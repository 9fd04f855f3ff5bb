"""Serialises the calls of a model, and ends the running one when the model is closed."""

from __future__ import annotations

import _thread
import os
import threading

from flexgen.errors import RequestError

_OWN_THREADS = "flexgen-"


class InUse:
    """A lock of the running call, because slots and lanes serve one call at a time."""

    def __init__(self) -> None:
        self._owner: object = None  # the running call
        self._by: int | None = None  # its thread
        self._running = _thread.allocate_lock()  # locked while it runs
        self._lock = _thread.allocate_lock()
        self._closed = False
        self._process = os.getpid()

    @property
    def inherited(self) -> bool:
        """Whether this process is a fork of the one that opened the model, and so does not have its threads."""
        return os.getpid() != self._process

    def begin(self, owner: object) -> None:
        """Begin the call `owner`, unless it has already begun. Raises RequestError while another call runs, and the
        errors of `refuse_closed`."""
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
                    "another call of this model is still running: read its stream to the end, or close the stream"
                )
            # No calls here: Python handles signals only at calls and jumps, so these statements run together or not.
            self._owner = owner
            self._by = here
            self._running = running

    def end(self, owner: object) -> None:
        """End the call `owner`. Does nothing if it is not the running call."""
        if self.inherited:
            return
        with self._lock:
            if self._owner is owner:
                self._owner = None
                self._by = None
                self._running.release()

    def check(self) -> None:
        """Raise RequestError if the model is being closed, or if this process was forked from within the call. The
        call then ends before its next step."""
        if self.inherited:
            self.refuse_closed()
        if self._closed:
            raise RequestError("this model was closed by another thread while the call ran")

    def refuse_closed(self) -> None:
        """Raise RequestError if the model is closed, or if this process was forked after the model was opened."""
        if self.inherited:
            raise RequestError(
                f"this model was opened by process {self._process}, and process {os.getpid()} is a fork of it: the "
                "threads that serve the model are not copied by a fork. Open the model in the child with OptLM(...), "
                "or start workers with multiprocessing's 'spawn' method and open it there"
            )
        if self._closed:
            raise RequestError("this model is closed, its weights are freed; open it again with OptLM(...)")

    def refuse_inside(self) -> None:
        """Raise RequestError in the thread of a call and in its worker threads, which cannot wait for its end."""
        here = threading.current_thread()
        inside = here.ident == self._by or here.name.startswith(_OWN_THREADS)
        if self._owner is not None and inside:
            raise RequestError(
                "close() was called from within a call of this model, by a function that it calls for each token: "
                "raise an exception to end the call, then close the model"
            )

    def close(self) -> None:
        """End the running call and wait for its end. No further call can begin."""
        self._closed = True
        with self._lock:
            running = self._running
        raised: BaseException | None = None
        while raised is None or running.locked():
            try:
                with running:
                    break
            except BaseException as error:  # Ctrl-C: memory must not be freed before the call has ended
                raised = error
        if raised is not None:
            raise raised
