"""The trade-off between throughput and latency: the best policy for each number of prompts that run together."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flexgen.errors import CapacityError, RequestError
from flexgen.policy import Policy, Tier
from flexgen.search.candidates import Search
from flexgen.units import format_seconds
from flexgen.workload import Workload


@dataclass(frozen=True)
class Point:
    """The best policy for `prompts` prompts that run together.

    seconds: the time until the last token of the last prompt.
    tokens_s: new tokens per second.
    """

    prompts: int
    seconds: float
    tokens_s: float
    policy: Policy


def find_frontier(find: Callable[[Workload], Search], workload: Workload) -> list[Point]:
    """The points for 1, 2, 4, ... prompts, up to the workload's number, that no other point beats in both figures.

    They are sorted by rising latency. `find` searches for a policy; after the first number of prompts that does not
    fit, no larger ones are tried.
    """
    points = []
    for prompts in _doubling(workload.num_prompts):
        try:
            best = find(replace(workload, num_prompts=prompts)).best
        except CapacityError:
            break
        report = best.prediction.report
        points.append(Point(prompts, report.total_s, report.throughput_tokens_s, best.policy))
    return not_dominated(points)


def not_dominated(points: Iterable[Point]) -> list[Point]:
    """The points that no other point beats in latency and throughput, by rising latency."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda point: (point.seconds, -point.tokens_s)):
        if not kept or point.tokens_s > kept[-1].tokens_s:
            kept.append(point)
    return kept


def frontier_table(points: Sequence[Point]) -> str:
    """A table with a line for each point."""
    rows = [("prompts", "latency", "tokens/s", "block", "weights")]
    for point in points:
        policy = point.policy
        rows.append(
            (
                f"{point.prompts}",
                format_seconds(point.seconds),
                f"{point.tokens_s:,.3g}" if point.tokens_s < 1000 else f"{point.tokens_s:,.0f}",
                f"{policy.num_gpu_batches} x {policy.gpu_batch_size}",
                ", ".join(
                    f"{tier} {policy.weights.percent(tier):.0f}%"
                    for tier in Tier
                    if policy.weights.percent(tier)
                ),
            )
        )
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if n > 2 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def plotter() -> Any:
    """matplotlib's pyplot, for `draw`. Raises RequestError if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise RequestError("matplotlib is not installed, but the plot needs it: pip install 'flexgen[plot]'")
    importlib.import_module("matplotlib").use("Agg")
    return importlib.import_module("matplotlib.pyplot")


def draw(plot: Any, points: Sequence[Point], path: str, title: str) -> None:
    """Write a plot of the frontier to `path`."""
    figure, axes = plot.subplots(figsize=(6.4, 4.4), layout="constrained")
    axes.plot([point.seconds for point in points], [point.tokens_s for point in points], "o-")
    for point in points:
        axes.annotate(
            f"{point.prompts}", (point.seconds, point.tokens_s), textcoords="offset points", xytext=(5, -10)
        )
    axes.set(xscale="log", yscale="log", xlabel="seconds until all prompts are done", ylabel="new tokens/s")
    axes.set_title(f"{title}\nnumbers: prompts together", fontsize="medium")
    axes.grid(which="both", alpha=0.3)
    figure.savefig(path, dpi=150)
    plot.close(figure)


def _doubling(most: int) -> list[int]:
    counts = [1]
    while counts[-1] * 2 < most:
        counts.append(counts[-1] * 2)
    return counts if most == 1 else [*counts, most]
