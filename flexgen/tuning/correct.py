"""Corrects a machine's figures with the times of runs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from flexgen.policy import Policy, Split, Tier
from flexgen.predict.hardware import Hardware, Points, interpolated
from flexgen.results.report import ByPhase
from flexgen.results.trace import LaneName, Phase

MOST = 4.0
"""The maximum factor of one correction, because a run that was disturbed says little about the machine."""

_COUNTS_FROM = 0.05
"""The minimum time of a lane, as a share of the phase's longest lane. A few short jobs say nothing about a rate."""


@dataclass(frozen=True)
class Seen:
    """A run whose lanes were timed alone, with the prediction of the same run.

    measured: seconds by phase and lane, as in `OptLM.lane_seconds`.
    predicted: seconds by phase and lane, as in `Report.phases`.
    """

    policy: Policy
    dtype: str
    prompt_len: int
    measured: ByPhase
    predicted: ByPhase

    @property
    def together(self) -> bool:
        """Whether host and device are one resource, as on `emulated`.

        Then a run counts attention on the host as computation, but a prediction does not.
        """
        apart = {lane for lanes in self.measured.values() for lane in lanes}
        return LaneName.HOST not in apart and any(LaneName.HOST in lanes for lanes in self.predicted.values())

    def rows(self, phase: Phase) -> int:
        """The rows of activations in a product of the phase."""
        return self.policy.gpu_batch_size * (self.prompt_len if phase is Phase.PREFILL else 1)


class _Ratio:
    """The ratio of predicted to measured seconds, which is the correction factor of a rate."""

    def __init__(self) -> None:
        self.predicted = self.measured = 0.0

    def add(self, predicted: float, measured: float) -> None:
        self.predicted += predicted
        self.measured += measured

    @property
    def rate(self) -> float:
        if not self.measured or not self.predicted:
            return 1.0
        return min(max(self.predicted / self.measured, 1 / MOST), MOST)


def corrected(hardware: Hardware, seen: Iterable[Seen]) -> Hardware:
    """`hardware` with figures multiplied so that the predicted times of its lanes match the measured ones.

    The time of a lane does not show which of its figures is wrong, so all of them get the same factor. For a
    transfer, these are the bandwidth and the fixed time. For a computation, they are the products at that number of
    rows, the attention, and the fixed time of a cell (from the decode, which has the most cells). Between measured
    numbers of rows, the factor is interpolated.
    """
    runs = list(seen)
    lanes: defaultdict[tuple[LaneName, Phase], _Ratio] = defaultdict(_Ratio)
    products: defaultdict[str, defaultdict[int, _Ratio]] = defaultdict(lambda: defaultdict(_Ratio))
    for run in runs:
        for phase, lane, predicted, measured in _believed(run):
            lanes[lane, phase].add(predicted, measured)
            if lane is LaneName.COMPUTE:
                products[run.dtype][run.rows(phase)].add(predicted, measured)

    def rate(lane: LaneName, *phases: Phase) -> float:
        both = _Ratio()
        for phase in phases or tuple(Phase):
            both.add(lanes[lane, phase].predicted, lanes[lane, phase].measured)
        return both.rate

    decode, prefill = rate(LaneName.COMPUTE, Phase.DECODE), rate(LaneName.COMPUTE, Phase.PREFILL)
    host = decode if any(run.together for run in runs) else rate(LaneName.HOST)
    moved = (LaneName.TO_DEVICE, LaneName.DISK_READ, LaneName.DISK_WRITE)
    on_device, on_host = _attended(hardware, runs)
    dtypes = {run.dtype for run in runs}
    codecs = {name for run in runs for name in _codecs(run.policy.weights)}
    fixed = hardware.fixed
    encoded = {
        key: _at_rows(points, products[key.split()[0]], add=False) if key.split()[0] in products else points
        for key, points in hardware.encoded_products.items()
    }
    return hardware.replace(
        bandwidth={lane: n * (rate(lane) if lane in moved else 1) for lane, n in hardware.bandwidth.items()},
        pageable={lane: n * (rate(lane) if lane in moved else 1) for lane, n in hardware.pageable.items()},
        products=_products(hardware.products, products),
        packed_products=_products(hardware.packed_products, products),
        encoded_products=encoded,
        prefill_attention=_times(hardware.prefill_attention, dtypes, prefill),
        device_attention=_times(hardware.device_attention, on_device, decode),
        host_attention=_times(hardware.host_attention, on_host, host),
        elementwise={
            dtype: tuple((numbers, s / rate(LaneName.COMPUTE)) for numbers, s in points)
            if dtype in dtypes
            else points
            for dtype, points in hardware.elementwise.items()
        },
        around_attention=_times(hardware.around_attention, dtypes, 1 / rate(LaneName.COMPUTE)),
        start={lane: seconds / rate(lane) for lane, seconds in hardware.start.items()},
        busy_start={lane: seconds / rate(lane) for lane, seconds in hardware.busy_start.items()},
        decoding={
            key: n * (rate(LaneName.COMPUTE) if key.split()[-1] in codecs else 1)
            for key, n in hardware.decoding.items()
        },
        fixed=replace(
            fixed,
            cell=fixed.cell / decode,
            attention=fixed.attention / decode,
            recording=fixed.recording / decode,
            recorded=fixed.recorded / decode,
            joined=fixed.joined / decode,
            attend=fixed.attend / host,
            split=fixed.split / decode,
            encoded=fixed.encoded / decode,
            ids=fixed.ids / decode,
            stage=fixed.stage / rate(LaneName.TO_DEVICE),
            disk_job=fixed.disk_job / rate(LaneName.DISK_READ),
        ),
    )


def _believed(run: Seen) -> Iterable[tuple[Phase, LaneName, float, float]]:
    """(phase, lane, predicted, measured) of the lanes whose times are long enough in both."""
    for phase, measured in run.measured.items():
        predicted = dict(run.predicted.get(phase, {}))
        if run.together:
            predicted[LaneName.COMPUTE] = predicted.get(LaneName.COMPUTE, 0.0) + predicted.pop(
                LaneName.HOST, 0.0
            )
        for lane in measured.keys() & predicted.keys():
            if all(
                by_lane[lane] >= _COUNTS_FROM * max(by_lane.values()) for by_lane in (measured, predicted)
            ):
                yield phase, lane, predicted[lane], measured[lane]


def _products(tables: Mapping[str, Points], seen: Mapping[str, Mapping[int, _Ratio]]) -> dict[str, Points]:
    return {
        dtype: _at_rows(points, seen[dtype]) if dtype in seen else points for dtype, points in tables.items()
    }


def _at_rows(points: Points, seen: Mapping[int, _Ratio], add: bool = True) -> Points:
    """The points of products, each multiplied by the factor at its rows.

    add: whether to add a point at each measured number of rows. It is False if the last point limits the rows of a
        kind of product.
    """
    rows = sorted(seen)
    factors = [math.log(seen[n].rate) for n in rows]
    at = sorted({float(n) for n in rows if add} | {n for n, _ in points})
    factor = np.exp(np.interp(np.log(at), np.log(rows), factors))
    return tuple((n, interpolated(points, n) * float(f)) for n, f in zip(at, factor, strict=True))


def _attended(hardware: Hardware, runs: Sequence[Seen]) -> tuple[set[str], set[str]]:
    """The formats of cache over which the device computed attention in these runs, and those of the host."""
    on_device: set[str] = set()
    on_host: set[str] = set()
    for run in runs:
        by_host = hardware.topology.host_attends(run.policy)
        for tier in Tier:
            if run.policy.cache.percent(tier):
                codec = run.policy.cache[tier].codec
                form = run.dtype if codec == "none" else codec
                (on_host if by_host and tier is not Tier.GPU else on_device).add(form)
    return on_device, on_host


def _codecs(split: Split) -> set[str]:
    return {split[tier].codec for tier in Tier if split.percent(tier)}


def _times(table: Mapping[str, Any], keys: set[str], factor: float) -> dict[str, Any]:
    return {key: n * factor if key in keys else n for key, n in table.items()}
