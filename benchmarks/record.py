"""Interleaved measurements, and their results: one JSON per benchmark, with the command and the machine."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

RESULTS = Path(__file__).resolve().parent / "results"


def machine() -> dict[str, Any]:
    """The machine of the measurement."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def interleaved(
    cases: Mapping[str, Callable[[], dict[str, float]]], repeats: int
) -> dict[str, dict[str, Any]]:
    """Run every case once, and repeat this `repeats` times, so that a drift of the machine affects all cases equally.

    Each case returns figures by name. The result has the median and all values for each case and figure.
    """
    values: dict[str, dict[str, list[float]]] = {name: {} for name in cases}
    for n in range(repeats):
        for name, run in cases.items():
            for figure, value in run().items():
                values[name].setdefault(figure, []).append(value)
            print(f"repeat {n + 1}/{repeats} {name}: {_last(values[name])}", file=sys.stderr, flush=True)
    return {
        name: {figure: {"median": statistics.median(all_), "all": all_} for figure, all_ in figures.items()}
        for name, figures in values.items()
    }


def compared(name: str, expected: Sequence[float], measured: float) -> dict[str, Any]:
    """Print a predicted speed next to the measured one. Both are in tokens/s. Returns the figures for the results.

    expected: the predicted speeds, one for each measurement of the machine. The prediction is their harmonic mean,
        which is the speed of the mean time.
    """
    speed = statistics.harmonic_mean(expected)
    print(f"{name}: predicted {speed:.1f} tokens/s, measured {measured:.1f}, {speed / measured - 1:+.0%}")
    return {"tokens_s": speed, "of_measured": speed / measured, "by_measurement": list(expected)}


def anywhere(word: str) -> str:
    """Remove paths, which have no meaning on other machines."""
    path = Path(word)
    return word if not path.is_absolute() else "DIR" if path.is_dir() else "PATH"


def _last(figures: Mapping[str, list[float]]) -> str:
    return ", ".join(f"{figure} {values[-1]:.4g}" for figure, values in figures.items())


def load_results(path: Path) -> dict[str, Any]:
    """The contents that `save` wrote to `path`; empty if there is no file."""
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return document


def save(name: str, figures: Mapping[str, Any], path: Path | None = None) -> Path:
    """Write figures, with the command and the machine, to results/<name>.json."""
    path = path or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    command = "python " + " ".join([f"benchmarks/{Path(sys.argv[0]).name}", *map(anywhere, sys.argv[1:])])
    document = {"command": command, "machine": machine(), **figures}
    write_whole(path, json.dumps(document, indent=1) + "\n")
    return path


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically, even if the process is killed."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
