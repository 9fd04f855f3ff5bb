"""`flexgen models`: the families, the sizes, and whether they fit a machine."""

import json
import shlex
from pathlib import Path

import pytest

from flexgen import catalog
from flexgen.models import open_model
from flexgen.models.families import known_families
from flexgen.models.known import known_names
from flexgen.predict.hardware import Hardware
from flexgen.workload import Workload

DOCS = Path(__file__).parents[1] / "docs" / "models.md"
SMALL = "--prompt-len 32 --gen-len 4 --num-prompts 4"


def listed(flags, capsys):
    assert catalog.main(shlex.split(flags)) == 0
    return capsys.readouterr().out


def entry(name, **more):
    return catalog.size_entry(open_model(name, "dummy")[0], **more)


def test_the_documentation_has_the_tables_of_the_command(capsys):
    """docs/models.md. If this fails, replace both tables there by those of `flexgen models --markdown`."""
    families, sizes = listed("--markdown", capsys).strip().split("\n\n")
    page = DOCS.read_text(encoding="utf-8")
    assert families in page and sizes in page
    assert [line.split("`")[1] for line in families.splitlines()[2:]] == known_families()
    assert [line.split("`")[1] for line in sizes.splitlines()[2:]] == list(known_names())


def test_families_have_the_features_of_their_layers():
    features = {one.name: set(one.features) for one in catalog.family_entries()}
    assert features["llama"] == features["qwen3"] == set()
    assert features["gpt_oss"] == {"experts", "windows", "sinks"}
    assert features["gemma2"] == {"windows", "caps"} and features["bloom"] == {"ALiBi"}
    assert features["cohere2"] == {"windows", "parallel residuals"}
    assert features["granitemoeshared"] == {"experts"}, "of its default config: no size of it is known"


@pytest.mark.parametrize(
    ("name", "published"),  # the sums of the files' tensors, in GB
    [("gpt-oss-20b", 13.76), ("gpt-oss-120b", 65.25), ("minimax-m2", 230.1), ("qwen3-8b", 16.38), ("gpt2", 0.498)],
)  # fmt: skip
def test_bytes_as_published(name, published):
    assert entry(name).nbytes["published"] / 1e9 == pytest.approx(published, rel=0.003)


def test_bytes_of_codecs():
    """1 or half a byte for each value, and 4 bytes for each group of 64 values, except for norms."""
    nbytes = entry("llama-3.1-8b").nbytes
    count = nbytes["bfloat16"] / 2
    assert count == 8_030_261_248
    assert nbytes["int8"] / count == pytest.approx(1 + 4 / 64, rel=1e-3)
    assert nbytes["int4"] / count == pytest.approx(1 / 2 + 4 / 64, rel=1e-3)


def test_a_list_of_names_leaves_the_families_out(capsys):
    out = listed("Qwen/Qwen3-0.6B opt-30b", capsys)
    assert [line.split()[0] for line in out.splitlines()] == ["Name", "qwen3-0.6b", "opt-30b"]


def test_predictions_and_their_json(capsys):
    found = json.loads(listed(f"opt-125m opt-1.3b --hardware laptop-16g {SMALL} --json -", capsys))
    assert found["hardware"] == "laptop-16g" and found["families"] == []
    sizes = {"prompt_len": 32, "gen_len": 4, "num_prompts": 4, "prefix": 0}
    assert found["workload"] == {**sizes, "mean_new": None, "copied": 1.0, "cuts": [], "groups": 1}
    small, large = (one["fit"] for one in found["models"])
    assert small["fits"] and large["fits"] and small["tokens_s"] > 2 * large["tokens_s"] > 0
    assert small["policy"].startswith("weights 100% cpu; 1 x ")


def test_searches_in_several_processes_give_the_same_entries_in_the_same_order(monkeypatch):
    names = ["opt-350m", "qwen3-0.6b", "opt-125m"]
    asked = Hardware.preset("laptop-16g"), Workload(32, 4, 4)
    alone = list(catalog.size_entries(names, *asked))
    monkeypatch.setattr(catalog, "_SEARCHES_EACH", 1)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    assert list(catalog.size_entries(names, *asked)) == alone
    assert [one.name for one in alone] == names and all(one.fit.fits for one in alone)


def test_the_table_has_speed_and_policy(capsys):
    head, row = listed(f"opt-125m --hardware laptop-16g {SMALL}", capsys).splitlines()
    assert head.endswith("Policy") and row.endswith("x 4 prompts")


def test_a_size_that_does_not_fit(machine):
    spec, _ = open_model("opt-125m", "dummy")
    small = machine(capacity={"cpu": "64MiB", "disk": "64MiB"})
    found = catalog.fit(spec, small, Workload(32, 4, 4))
    assert not found.fits and found.tokens_s is None and "no policy for opt-125m fits" in found.reason
    assert "does not fit" in catalog._aligned(catalog._sizes_table([catalog.size_entry(spec, found)]))


def test_a_size_without_a_prediction_says_why():
    spec, _ = open_model("gpt2", "dummy")
    found = catalog.fit(spec, Hardware.preset("laptop-16g"), Workload(1024, 4, 4))
    assert found.fits is None and "exceed the 1024 positions" in found.reason


def test_lossy_lets_the_policies_use_codecs(capsys):
    lossless, lossy = (
        json.loads(listed(f"opt-30b --hardware laptop-16g {SMALL} --json - {flag}", capsys))["models"][0][
            "fit"
        ]
        for flag in ("", "--lossy")
    )
    assert " in int4" in lossy["policy"] and lossy["tokens_s"] > 2 * lossless["tokens_s"]


def test_an_unknown_name_is_refused(capsys):
    assert catalog.main(["qwen3-9b"]) == 1
    assert "'qwen3-9b' is not a known size (did you mean 'qwen3-8b'?)" in capsys.readouterr().err
