"""The exceptions of flexgen.

A message gives the cause, the value, the limit and the fix. Invalid input raises before any work is done. Only
`LaneError` and its subclasses are raised while data is moving. Use `shown` to put a value into a message: values come
from callers and files, and may have any size, depth or type.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any


class FlexGenError(Exception):
    """The base class of all errors that flexgen raises."""


class PolicyError(FlexGenError, ValueError):
    """A policy or its TOML file is invalid, for example by a sum, a sign, a type or an unknown key."""


class RequestError(FlexGenError, ValueError):
    """The arguments of a call (prompts, lengths, sampling) are invalid."""


class UnsupportedError(FlexGenError, NotImplementedError):
    """A feature of another library's interface that flexgen does not support."""


class ModelError(FlexGenError, ValueError):
    """A model's configuration or family is not supported, or the model was not found."""


class CheckpointError(FlexGenError, ValueError):
    """A checkpoint is missing or damaged, or does not contain the tensors of its configuration."""


class CapacityError(FlexGenError, MemoryError):
    """A memory plan needs more bytes on a tier than the tier has."""


class ScheduleError(FlexGenError, ValueError):
    """An order of steps is illegal or incomplete."""


class HardwareError(FlexGenError, ValueError):
    """A description of a machine is invalid, or lacks a figure that a prediction needs."""


class LaneError(FlexGenError, RuntimeError):
    """A step failed on a lane; `__cause__` is the original exception."""


class StepCapacityError(LaneError, CapacityError):
    """A step ran out of memory; the model can be used again."""


class DeviceError(LaneError):
    """The GPU has failed, and all further calls on it in this process fail. Start a new process."""


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: a similar known name, or "" without one."""
    close = difflib.get_close_matches(word, list(known), n=1) if isinstance(word, str) else ()
    return f" (did you mean {close[0]!r}?)" if close else ""


MOST_CHARACTERS = 200
"""The limit for a value in a message."""
MOST_OF_PATH = 4096
"""The limit for a path in a message: the longest path that Linux opens."""
_MOST_BITS = 128
"""The largest integer that is shown in digits. Python does not print more than 4300 digits."""


class _Repr(reprlib.Repr):
    """`repr` that stops after a few entries of a collection and a few levels of nesting."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = 8
        self.maxstring = self.maxother = MOST_CHARACTERS // 2

    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() > _MOST_BITS:
            return f"about {'-' if x < 0 else ''}2**{x.bit_length() - 1}"
        return repr(x)

    def repr_dict(self, x: dict[object, object], level: int) -> str:
        """Keep the order of the dict; reprlib would sort the keys."""
        if level <= 0 and x:
            return "{...}"
        pairs: list[str] = []
        for key, value in x.items():
            if len(pairs) == self.maxdict:
                pairs.append("...")
                break
            pairs.append(f"{self.repr1(key, level - 1)}: {self.repr1(value, level - 1)}")
        return "{" + ", ".join(pairs) + "}"

    def repr_instance(self, x: Any, level: int) -> str:
        try:
            if type(x).__module__ == "numpy" and not x.shape:
                return self.repr1(x.item(), level)  # 96, not np.int64(96)
            text = repr(x)
        except Exception:  # a caller's class may raise anything, and deep nesting raises RecursionError
            return f"<{type(x).__name__}>"
        return cut(text, self.maxother)


_repr = _Repr()


def shown(value: object) -> str:
    """`repr(value)` in at most `MOST_CHARACTERS` characters and "..."; never raises an Exception."""
    try:
        return cut(_repr.repr(value))
    except Exception:  # reprlib dispatches on the name of the type, which may not be unique
        return f"<{cut(type(value).__name__)}>"


def shown_path(path: object) -> str:
    """A path in a message: complete, so that you can copy it, unless it is too long for a path."""
    return cut(str(path), MOST_OF_PATH)


def cut(text: str, most: int = MOST_CHARACTERS) -> str:
    """`text`, or its first `most` characters and "..." if it is longer."""
    return text if len(text) <= most else f"{text[:most]}..."
