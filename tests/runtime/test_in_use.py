"""One call of a model at a time, and none once it is closed."""

import threading

import pytest

from flexgen.errors import RequestError
from flexgen.runtime.in_use import InUse

PATIENCE = 60.0
CALL = object()


def test_one_call_at_a_time():
    in_use = InUse()
    first, second = object(), object()
    for _ in range(2):  # a call that is entered twice is one call
        in_use.begin(first)
    in_use.check()
    with pytest.raises(RequestError, match="another call of this model is still running"):
        in_use.begin(second)
    in_use.end(second)
    with pytest.raises(RequestError, match="another call of this model is still running"):
        in_use.begin(second)
    in_use.end(first)
    in_use.begin(second)
    in_use.end(first)  # it is over: the second one runs
    with pytest.raises(RequestError, match="another call of this model is still running"):
        in_use.begin(first)


def test_closing_waits_for_the_call_and_lets_none_begin():
    in_use = InUse()
    in_use.begin(CALL)
    closing = threading.Thread(target=in_use.close, daemon=True)
    closing.start()
    with pytest.raises(RequestError, match="closed by another thread"):
        while closing.is_alive():  # it does not end before the call has
            in_use.check()
    in_use.end(CALL)
    closing.join(PATIENCE)
    assert not closing.is_alive()
    for _ in range(2):  # the second one is refused for the same reason
        with pytest.raises(RequestError, match="open it again"):
            in_use.begin(CALL)


def test_who_waits_for_the_end_of_a_call_must_not_be_inside_it():
    in_use = InUse()
    in_use.refuse_inside()
    in_use.begin(CALL)
    refused = []

    def ask():
        try:
            in_use.refuse_inside()
        except RequestError:
            refused.append(threading.current_thread().name)

    for name in ("flexgen-host", "of the user"):
        thread = threading.Thread(target=ask, name=name)
        thread.start()
        thread.join()
    assert refused == ["flexgen-host"]
    with pytest.raises(RequestError, match="from within a call"):
        in_use.refuse_inside()
