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


def test_the_table_of_avx2_has_the_measured_figures():
    cases = json.loads((ROOT / "benchmarks/results/cpu_peers_avx2.json").read_text(encoding="utf-8"))["cases"]
    _, _, text = (ROOT / "docs/performance.md").read_text(encoding="utf-8").partition("### With AVX2 only")
    rows = re.findall(r"^\| (\w+), batch (\d+) \|(.*)\|$", text.partition("\n## ")[0], re.MULTILINE)
    assert sorted(f"{form}-{batch}" for form, batch, _ in rows) == sorted(cases)
    for form, batch, cells in rows:
        case = cases[f"{form}-{batch}"]
        ours, theirs = case["medians"]["flexgen"], case["medians"]["llama.cpp"]
        expected = [
            f"{ours['step_s'] * 1e3:.1f}",
            f"{theirs['step_s'] * 1e3:.1f} ({case['ratios']['llama.cpp']['step_s']:.2f})",
            f"{ours['prefill_s']:.2f}",
            f"{theirs['prefill_s']:.2f} ({case['ratios']['llama.cpp']['prefill_s']:.2f})",
        ]
        assert [cell.strip() for cell in cells.split("|")] == expected
