"""Every error flexgen raises on purpose, so that callers can catch by class.

A message says what is wrong, the value, the limit and the fix. Bad input is refused before any
work is done; `LaneError` and its subclasses are raised while bytes are moving.
"""

import difflib
from collections.abc import Iterable


class FlexGenError(Exception):
    """Base of all errors raised on purpose by flexgen."""


class PolicyError(FlexGenError, ValueError):
    """A policy (or its TOML) is not valid: sums, signs, types, unknown keys."""


class RequestError(FlexGenError, ValueError):
    """The arguments of a call (prompts, lengths, sampling) cannot be served as they are."""


class UnsupportedError(FlexGenError, NotImplementedError):
    """Asked for in the terms of another library, which flexgen does not do."""


class ModelError(FlexGenError, ValueError):
    """A model's configuration or family is not supported, or the model cannot be found."""


class CheckpointError(FlexGenError, ValueError):
    """A checkpoint is missing, damaged, or does not hold the tensors its configuration promises."""


class CapacityError(FlexGenError, MemoryError):
    """A memory plan needs more bytes on a tier than the tier has."""


class ScheduleError(FlexGenError, ValueError):
    """An order of steps is illegal or incomplete."""


class HardwareError(FlexGenError, ValueError):
    """A description of a machine is not valid, or lacks a figure that a prediction needs."""


class LaneError(FlexGenError, RuntimeError):
    """A step failed while it ran on a lane; `__cause__` is the original exception."""


class StepCapacityError(LaneError, CapacityError):
    """A step found less memory than it needed; the model can be used again."""


class DeviceError(LaneError):
    """The GPU has failed: no call on it works in this process any more. Start a new one."""


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the known one that is like it, if there is one."""
    close = difflib.get_close_matches(word, list(known), n=1) if isinstance(word, str) else ()
    return f" (did you mean {close[0]!r}?)" if close else ""
