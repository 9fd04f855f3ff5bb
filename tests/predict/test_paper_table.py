"""Every policy that names a machine simulates to what it says, and FlexGen's own to about what was published."""

import contextlib
import io
import json
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from flexgen import simulate

ROOT = Path(__file__).parents[2]
TABLE = json.loads((ROOT / "benchmarks/results/paper_table.json").read_text())["rows"]
COMMAND = re.compile(r"^# python -m flexgen\.simulate (.*)$", re.MULTILINE)
SAID = re.compile(r"^# (?:Simulated|Predicted): ([\d.]+) tokens/s$", re.MULTILINE)
FOR_A_MACHINE = [path for path in sorted(ROOT.glob("policies/*.toml")) if COMMAND.search(path.read_text())]
# Without codecs and with: the compressed runs also wait for what nobody published a figure for.
TOLERANCE = {None: 0.25, "int4": 0.4}


@cache
def simulated(path):
    """The line of JSON of the command in the policy's comment, from some of the tokens only: the whole of OPT-175B
    takes seconds."""
    (flags,) = COMMAND.findall(path.read_text())
    out = io.StringIO()
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(out):
        assert simulate.main([*shlex.split(flags), "--samples", "1", "--json", "-"]) == 0
    return json.loads(out.getvalue())


@pytest.mark.parametrize("path", FOR_A_MACHINE, ids=lambda path: path.stem)
def test_a_policy_fits_its_machine_and_gives_what_its_comment_says(path):
    (said,) = SAID.findall(path.read_text())
    assert f"policies/{path.name} " in path.read_text(), "the command names another policy"
    assert simulated(path)["throughput_tokens_s"] == pytest.approx(float(said), rel=0.01)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row['model']}, {row['codec']}")
def test_the_originals_order_on_its_machine_gives_what_was_published(row):
    recorded = row["original"]
    found = simulated(ROOT / "policies" / f"{recorded['policy']}.toml")
    assert found["throughput_tokens_s"] == pytest.approx(recorded["throughput_tokens_s"], rel=0.01)
    assert (found["order"], found["device"]) == ("flexgen", "t4-paper")
    assert recorded["throughput_tokens_s"] == pytest.approx(row["published"], rel=TOLERANCE[row["codec"]])


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row['model']}, {row['codec']}")
def test_the_documented_table_is_the_recorded_one(row):
    columns = ["original", "our order", "our order on t4", "searched, same constants", "searched on t4"]
    original, *ours = (row[column]["throughput_tokens_s"] for column in columns)
    name = row["model"].upper() + (", int4" if row["codec"] else "")
    figures = [row["published"], original, original / row["published"], *ours]
    line = " | ".join([name, *(f"{figure:.2f}" for figure in figures)])
    assert f"| {line} |\n" in (ROOT / "docs/performance.md").read_text()


def test_a_searched_policy_is_better_than_the_published_one():
    for row in TABLE:
        assert row["searched on t4"]["throughput_tokens_s"] > row["our order on t4"]["throughput_tokens_s"]


def test_all_six_published_rows_are_there():
    # 8.70 is the paper's own figure for OPT-30B with compression; 8.38, which is harder, its repository's.
    published = {(row["model"], row["codec"]): row["published"] for row in TABLE}
    assert published == {
        ("opt-6.7b", None): 25.26,
        ("opt-6.7b", "int4"): 29.12,
        ("opt-30b", None): 7.32,
        ("opt-30b", "int4"): 8.38,
        ("opt-175b", None): 0.69,
        ("opt-175b", "int4"): 1.12,
    }
