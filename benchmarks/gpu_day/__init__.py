"""The small checks of `benchmarks/gpu.py`. Each is a command: `python -m gpu_day.NAME --json FILE [--toy]`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def arguments(description: str | None) -> argparse.Namespace:
    """The flags of all checks."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="file for the figures")
    parser.add_argument("--toy", action="store_true", help="small sizes, to test the check itself in seconds")
    return parser.parse_args()


def write(path: Path, figures: dict[str, Any]) -> None:
    """Write and print the figures so far."""
    text = json.dumps(figures, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
    print(text)
