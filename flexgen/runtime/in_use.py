"""That one call of a model runs at a time, and what becomes of it when the model is closed."""

from __future__ import annotations

import threading

from flexgen.errors import RequestError

_OWN_THREADS = "flexgen-"


class InUse:
    """Held by the call that runs: slots and lanes serve one at a time."""

    def __init__(self) -> None:
        self._held = threading.Lock()
        self._by: int | None = None  # the thread of the call
        self._closed = False

    def begin(self) -> None:
        """A call begins. Raises RequestError while another one runs, and once the model is closed."""
        if not self._held.acquire(blocking=False):
            raise RequestError(
                "another call of this model is still running: take all that its stream has, or close the stream"
            )
        self._by = threading.get_ident()
        try:
            self.refuse_closed()
        except RequestError:
            self.end()
            raise

    def end(self) -> None:
        """The call is over."""
        self._by = None
        self._held.release()

    def check(self) -> None:
        """Raise RequestError where the model is being closed: the call must end, and does before its next step."""
        if self._closed:
            raise RequestError("this model was closed by another thread while the call ran")

    def refuse_closed(self) -> None:
        """Raise RequestError once the model is closed."""
        if self._closed:
            raise RequestError("this model is closed, its weights are gone; open it again with OptLM(...)")

    def refuse_inside(self) -> None:
        """Raise RequestError in the thread of a call and in those that work for it: they cannot wait for its end."""
        here = threading.current_thread()
        if self._held.locked() and (here.ident == self._by or here.name.startswith(_OWN_THREADS)):
            raise RequestError(
                "close() was called from within a call of this model, by what it calls for each token: end the call "
                "first, by raising an exception, and close the model then"
            )

    def close(self) -> None:
        """End the call that runs, and wait for that; none begins any more."""
        self._closed = True
        with self._held:
            pass
