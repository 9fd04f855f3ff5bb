"""The README has the figures of `benchmarks/results/`."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = {
    "in 1.2 GB of memory": ("cpu_peers_limited", ("bf16-1", "bf16-32")),
    "the same, all in memory": ("cpu_peers", ("bf16-1", "bf16-32")),
    "the same, int4": ("cpu_peers", ("int4-1", "int4-32")),
}


@pytest.mark.parametrize("row", ROWS)
def test_rows_of_the_comparison_are_the_measured_ones(row):
    name, cases = ROWS[row]
    document = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    (line,) = [text for text in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if row in text]
    shown = [re.findall(r"[\d.]+", cell.split(":")[-1]) for cell in line.strip("| ").split("|")[2:]]
    for engine, figures in zip(("flexgen", "llama.cpp", "transformers"), shown, strict=True):
        assert figures or engine == "transformers"
        for case, figure in zip(cases, figures, strict=bool(figures)):
            measured = document["cases"][case]["medians"][engine]["tokens_per_s"]
            decimals = len(figure.partition(".")[2])
            assert figure == f"{measured:.{decimals}f}"
