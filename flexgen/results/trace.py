"""What ran when: one event per step and lane, the same shape for a run and for its prediction."""

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
    """One lane for each resource that serves one thing at a time.

    A lane stands for hardware, not for a kind of data: weights and cache that cross the same link queue
    in the same lane, so a lane's busy time can be held against what the hardware gives.
    """

    COMPUTE = "compute"  # the compute device
    HOST = "host"  # arithmetic and bookkeeping in host memory beside a compute device of its own
    TO_DEVICE = "to_device"  # link, host memory to device memory
    FROM_DEVICE = "from_device"
    DISK_READ = "disk_read"
    DISK_WRITE = "disk_write"


class Phase(StrEnum):
    """The two parts of generation, which follow one another: no order runs a block's second beside its first."""

    PREFILL = "prefill"  # the prompts, up to the first new token
    DECODE = "decode"  # the other new tokens


class Event(NamedTuple):
    """One stage of one step: `start` and `end` in seconds from the beginning of the call."""

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
        """Append events whose clock began `offset` seconds after this trace's."""
        self.events.extend(Event(s, lane, a + offset, b + offset) for s, lane, a, b in events)

    @property
    def span(self) -> float:
        """Seconds from the first start to the last end."""
        if not self.events:
            return 0.0
        return max(e.end for e in self.events) - min(e.start for e in self.events)

    def busy(self) -> dict[LaneName, float]:
        """Seconds in which each lane worked."""
        seconds: dict[LaneName, float] = defaultdict(float)
        for event in self.events:
            seconds[event.lane] += event.end - event.start
        return dict(seconds)

    def save(self, path: str | Path, layer_names: Iterable[str] = ()) -> None:
        """Write Chrome's trace event format (JSON object form), which Perfetto reads too.

        One row per lane; the event's name says the operation and the layer.
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
