import json
import shlex

import pytest

from flexgen import bench, simulate
from flexgen.policy import Policy
from flexgen.predict.hardware import Hardware

SMALL = "--model opt-125m --prompt-len 16 --gen-len 4 --gpu-batch-size 2 --num-gpu-batches 2"

WHOLE = "--percent 100 0 100 0 100 0 --gpu-batch-size 1 --num-gpu-batches 1"


def run(flags, capsys):
    assert simulate.main(shlex.split(flags)) == 0
    return capsys.readouterr().out


def test_card_json_and_trace_tell_the_same(tmp_path, capsys):
    out, trace = tmp_path / "out.jsonl", tmp_path / "trace.json"
    card = run(
        f"{SMALL} --hardware t4 --percent 50 50 0 100 100 0 --cpu-cache-compute no --json {out} --trace {trace}",
        capsys,
    )
    found = json.loads(out.read_text())
    assert f"{found['throughput_tokens_s']:,.1f} tokens/s" in card
    assert "opt-125m, float16 on t4" in card and "planned\n" in card and "at the peak" not in card
    assert (found["num_prompts"], found["order"]) == (4, "overlap_multi_batch")
    assert found["bound_share"] == pytest.approx(
        sum(max(lanes.values()) for lanes in found["phases"].values()) / found["total_s"]
    )
    events = json.loads(trace.read_text())["traceEvents"]
    # Every cell computes once: 4 tokens, 26 layers, 2 batches; a layer is called by its name.
    assert sum(e["ph"] == "X" and e["cat"] == "compute" for e in events) == 4 * 26 * 2
    assert any(e["name"] == "compute layers.11.mlp" for e in events)
    assert max(e["ts"] + e["dur"] for e in events if e["ph"] == "X") <= found["total_s"] * 1e6 + 1


def test_keys_are_those_of_a_run(tmp_path, capsys):
    predicted = json.loads(run(f"{SMALL} --hardware rtx-3090 --json -", capsys))
    ran = tmp_path / "ran.jsonl"
    flags = f"--device cpu --prompt-len 4 --gen-len 2 --num-prompts 2 --no-bound --json {ran}"
    assert bench.main(shlex.split(flags)) == 0
    assert list(predicted) == list(json.loads(ran.read_text()))


def test_a_file_of_ones_own_and_a_policy_file(tmp_path, capsys):
    Hardware.preset("laptop-16g").replace(name="mine").save(machine := tmp_path / "mine.toml")
    Policy(gpu_batch_size=2, weights={"disk": 100}).save(policy := tmp_path / "policy.toml")
    found = json.loads(
        run(
            f"--model opt-1.3b --policy {policy} --hardware {machine} --gen-len 3 --order normal --json -",
            capsys,
        )
    )
    assert (found["device"], found["dtype"], found["order"]) == ("mine", "float32", "normal")
    assert found["lanes"]["disk_read"] > 0 and "to_device" not in found["lanes"]


def test_fewer_samples_project_the_rest(capsys):
    flags = f"--model opt-125m --hardware t4 --prompt-len 16 --gen-len 64 {WHOLE}"
    exact, sampled = (json.loads(run(f"{flags} --json - {more}", capsys)) for more in ("", "--samples 2"))
    assert exact["projected_from"] is None and sampled["projected_from"] == 6
    assert sampled["total_s"] == pytest.approx(exact["total_s"], rel=0.01)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--hardware t5", "hardware 't5' is not known; known: t4"),
        ("--hardware nowhere.toml", "nowhere.toml: cannot read it"),
        (f"--hardware t4 --model opt-30b {WHOLE}", "on the gpu tier, which has 14.5 GiB"),
        ("--hardware t4 --model opt-125m --dtype bfloat16", "dtype 'bfloat16' has no figures for 't4'"),
        ("--hardware t4 --model opt-125m --prompt-len 2040", "2048 positions"),
        ("--hardware t4 --policy nowhere.toml", "nowhere.toml"),
    ],
)
def test_bad_input_is_one_clear_line(flags, said, capsys):
    assert simulate.main(shlex.split(flags)) == 1
    err = capsys.readouterr().err
    assert said in err and len(err.strip().splitlines()) == 1


def test_guesses_save_passes_over_a_slow_link(capsys):
    shape = "--gpu-batch-size 4 --num-gpu-batches 2 --percent 0 100 100 0 100 0 --prompt-len 200 --gen-len 40"
    job = f"--model opt-125m --hardware t4 {shape}"
    plain, guessing = (
        json.loads(run(f"{job} {flags} --json -", capsys)) for flags in ("", "--guess 4 --copied 2.5")
    )
    assert (plain["policy"]["guess"], guessing["policy"]["guess"]) == (0, 4)
    # 1 / 2.5 of the passes for the mean row. The block ends with the row that copies least.
    assert 0.45 < guessing["decode_s"] / plain["decode_s"] < 0.85


def test_a_prefix_is_computed_once(capsys):
    shape = "--gpu-batch-size 4 --num-gpu-batches 2 --percent 100 0 0 100 100 0 --prompt-len 200 --gen-len 4"
    job = f"--model opt-125m --hardware t4 {shape}"
    whole, shared = (
        json.loads(run(f"{job} {prefix} --json -", capsys)) for prefix in ("", "--prefix-len 160")
    )
    assert (whole["prefix"], shared["prefix"]) == (0, 160)
    assert shared["prefill_s"] < whole["prefill_s"] and shared["prompt_tokens"] == whole["prompt_tokens"]
    # The 8 rows have 160 tokens fewer, and one row more has them: 12 layers of 768 keys and values. Staging is
    # smaller too.
    saved = whole["plan_bytes"]["cpu"] - shared["plan_bytes"]["cpu"]
    assert 1 <= saved / (7 * 160 * 12 * 2 * 768 * 2) < 1.3
    card = run(f"{job} --prefix-len 160", capsys)
    assert "prefix         160 tokens, computed once for 8 prompts" in card
    assert "prefix  " not in run(job, capsys)


def test_groups_share_what_all_prompts_have_in_common(capsys):
    shape = "--gpu-batch-size 4 --num-gpu-batches 2 --percent 100 0 0 100 100 0 --prompt-len 200 --gen-len 4"
    job = f"--model opt-125m --hardware t4 {shape} --num-prompts 32 --prefix-len 160"
    one, apart, tree = (
        json.loads(run(f"{job} {groups} --json -", capsys))
        for groups in ("", "--prefix-groups 4", "--prefix-groups 4 --common-len 100")
    )
    assert one["prefill_s"] < min(tree["prefill_s"], apart["prefill_s"])
    assert [found["prefix"] for found in (one, apart, tree)] == [160, 0, 100]
    assert [found["reused_tokens"] for found in (one, apart, tree)] == [
        31 * 160,
        28 * 160,
        31 * 100 + 28 * 60,
    ]
    assert simulate.main(shlex.split(f"{job} --prefix-groups 33")) == 1
    assert "groups is 33, but there are 32 prompts" in capsys.readouterr().err


def test_rows_that_end_early_are_refilled(capsys):
    shape = "--gpu-batch-size 4 --num-gpu-batches 2 --percent 0 100 100 0 100 0 --prompt-len 32 --gen-len 32"
    job = f"--model opt-125m --hardware t4 {shape} --num-prompts 64"
    whole, early = (json.loads(run(f"{job} {more} --json -", capsys)) for more in ("", "--mean-new 8"))
    assert early["total_s"] < whole["total_s"] / 2 and early["new_tokens"] == pytest.approx(512, rel=0.05)
    assert list(early["stages"]) == ["fill", "steady", "drain"] and whole["stages"] == {}
    assert "of the places in use" in run(f"{job} --mean-new 8", capsys)
    assert simulate.main(shlex.split(f"{job} --mean-new 33")) == 1
    assert "mean_new is 33.0; it must be a number from 1 to gen_len, which is 32" in capsys.readouterr().err


def test_less_cache_is_reserved(capsys):
    shape = "--gpu-batch-size 4 --num-gpu-batches 8 --percent 0 100 0 100 0 100 --prompt-len 32 --gen-len 512"
    job = f"--model opt-125m --hardware t4 {shape} --num-prompts 64"
    whole, less, long = (
        json.loads(run(f"{job} {more} --json -", capsys))
        for more in ("--mean-new 16", "--mean-new 16 --reserve-new 32", "--reserve-new 32")
    )
    assert less["plan_bytes"]["cpu"] < 0.7 * whole["plan_bytes"]["cpu"]
    assert less["total_s"] == pytest.approx(whole["total_s"], rel=0.1) and less["put_back"] == 0
    assert long["put_back"] > 32 and long["total_s"] > less["total_s"]
    card = run(f"{job} --mean-new 16 --reserve-new 32", capsys)
    assert "cache for 32 of 512 new tokens per row on average; rows were put back to wait 0 times" in card
    assert "reserved  " not in run(job, capsys)
    assert simulate.main(shlex.split(f"{job} --reserve-new -1")) == 1
    assert "reserve_new is -1; it must be at least 0" in capsys.readouterr().err
