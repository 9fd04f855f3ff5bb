"""Traces: one event per step and lane, in the same form for a run and for its prediction."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from flexgen.schedule.steps import Step


class LaneName(StrEnum):
    """The lanes: one for each resource that serves one job at a time.

    A lane is a piece of hardware, not a kind of data. Weights and cache that cross the same link use the same lane,
    so you can compare the busy time of a lane with the speed of the hardware.
    """

    COMPUTE = "compute"  # the compute device
    HOST = "host"  # arithmetic and bookkeeping in host memory, if the compute device is separate
    TO_DEVICE = "to_device"  # the link from host memory to device memory
    FROM_DEVICE = "from_device"
    DISK_READ = "disk_read"
    DISK_WRITE = "disk_write"


class Phase(StrEnum):
    """The two phases of generation. The decode of a block begins after its prefill."""

    PREFILL = "prefill"  # computes the prompts and the first new tokens
    DECODE = "decode"  # computes the other new tokens


class Event(NamedTuple):
    """One stage of one step. `start` and `end` are in seconds since the beginning of the call."""

    step: Step
    lane: LaneName
    start: float
    end: float


@dataclass
class Trace:
    """The events of one call, in the order in which they were recorded."""

    events: list[Event] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.events)

    def extend(self, events: Iterable[Event], offset: float = 0.0) -> None:
        """Append events whose time 0 is `offset` seconds after that of this trace."""
        self.events.extend(Event(s, lane, a + offset, b + offset) for s, lane, a, b in events)

    @property
    def span(self) -> float:
        """The seconds from the first start to the last end."""
        if not self.events:
            return 0.0
        return max(e.end for e in self.events) - min(e.start for e in self.events)

    def busy(self) -> dict[LaneName, float]:
        """The busy time of each lane in seconds."""
        seconds: dict[LaneName, float] = defaultdict(float)
        for event in self.events:
            seconds[event.lane] += event.end - event.start
        return dict(seconds)

    def save(self, path: str | Path, layer_names: Iterable[str] = ()) -> None:
        """Write the trace in Chrome's trace event format (as a JSON object), which Perfetto also reads.

        There is one row per lane. The name of an event is its operation and its layer.
        """
        names = list(layer_names)
        rows = {lane: n for n, lane in enumerate(LaneName)}
        events: list[dict[str, object]] = [
            {"ph": "M", "name": "thread_name", "pid": 0, "tid": n, "args": {"name": str(lane)}}
            for lane, n in rows.items()
        ]
        for step, lane, start, end in self.events:
            layer = names[step.layer] if step.layer < len(names) else str(step.layer)
            events.append(
                {
                    "ph": "X",
                    "name": f"{step.op.name.lower()} {layer}",
                    "cat": step.op.name.lower(),
                    "pid": 0,
                    "tid": rows[lane],
                    "ts": start * 1e6,
                    "dur": (end - start) * 1e6,
                    "args": {"token": step.token, "layer": step.layer, "batch": step.batch},
                }
            )
        document = {"displayTimeUnit": "ms", "traceEvents": events}
        Path(path).write_text(json.dumps(document), encoding="utf-8")
