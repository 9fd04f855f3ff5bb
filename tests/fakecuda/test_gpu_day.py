"""`benchmarks/gpu.py` from end to end, at toy size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("simulated", reason="runs on the simulated GPU: `make test-cuda`")

ROOT = Path(__file__).parents[2]
STEPS = [
    "races",
    "leaks",
    "attention",
    "links",
    "graphs",
    "probe",
    "busy",
    "opt-6.7b, weights streamed",
    "opt-30b",
]
FILES = {"opt-6.7b, weights streamed": "opt-6.7b_weights_streamed"}


def test_the_steps_run_at_toy_size(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--toy", "--out", str(tmp_path)]
    done = subprocess.run([*command, "--only", *STEPS], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout
    results = {name: json.loads((tmp_path / f"{FILES.get(name, name)}.json").read_text()) for name in STEPS}
    reports = {name: result["report"] for name, result in results.items()}
    assert all(kind["hazards"] == 0 < kind["operations"] for kind in reports["races"].values())
    assert reports["leaks"]["grown"] == 0 and len(reports["leaks"]["used"]) == 5
    assert {"first", "second"} <= reports["attention"]["math float16"]["prompt of 8"].keys()
    assert all(rate > 0 for rates in reports["links"].values() for rate in rates.values())
    assert len(reports["graphs"]) == 4 and all(len(figures) == 3 for figures in reports["graphs"].values())
    assert reports["busy"]["whole"]["seconds"] > 0 and reports["busy"]["decode"]["busy_share"] is None
    assert reports["opt-30b"]["prompt_len"] == 8 and reports["opt-30b"]["bound_share"] > 0
    assert set(json.loads((tmp_path / "comparison.json").read_text())["share of the goal"]) == set(STEPS[-2:])
    assert reports["probe"]["pageable"].keys() == {"to_device", "from_device"}
    assert reports["probe"]["compute_capability"] == 9.0
    assert reports["probe"]["products"]["float16"] and reports["probe"]["fixed"]["cell"] > 0
