import json
import shlex
from pathlib import Path

import pytest

from flexgen import bench
from flexgen.policy import Policy, Tier

ROOT = Path(__file__).parents[1]
TINY = "--weights dummy --prompt-len 6 --gen-len 4 --device cpu".split()


@pytest.fixture
def tiny_model(tmp_path):
    config = dict(
        model_type="opt", vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48,
        max_position_embeddings=64, word_embed_proj_dim=32, dtype="float32",
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def read(*flags):
    return bench.read_policy(bench.make_parser().parse_args(flags))


def test_flags_of_flexgen_override_the_file(tmp_path):
    path = tmp_path / "policy.toml"
    Policy(gpu_batch_size=3, weights={"cpu": 100}, overlap=False).save(path)
    assert read("--policy", str(path)) == Policy.load(path)
    changed = read(
        *["--policy", str(path), "--percent", "10", "50", "0", "100", "100", "0", "--num-gpu-batches", "2"],
        *["--overlap", "--sep-layer", "false", "--cpu-cache-compute"],
    )
    assert changed.weights.percent(Tier.DISK) == 40
    assert changed.cache.percent(Tier.CPU) == 100
    assert (changed.gpu_batch_size, changed.num_gpu_batches) == (3, 2)
    assert (changed.overlap, changed.sep_layer, changed.attend_on) == (True, False, "cpu")
    assert read("--policy", str(path), "--cpu-cache-compute", "no").attend_on == "gpu"
    assert read("--policy", str(path), "--attn-sparsity", "0.1").attn_sparsity == 0.1


def test_card_json_and_trace_tell_the_same(tiny_model, tmp_path, capsys):
    out, trace = tmp_path / "out.jsonl", tmp_path / "trace.json"
    flags = ["--model", tiny_model, *TINY, "--gpu-batch-size", "2", "--num-gpu-batches", "2"]
    flags += ["--percent", "0", "50", "0", "50", "0", "100", "--json", str(out), "--trace", str(trace)]
    assert bench.main(flags) == 0
    found = json.loads(out.read_text())
    assert (found["num_prompts"], found["prompt_len"], found["gen_len"]) == (4, 6, 4)
    assert found["throughput_tokens_s"] == pytest.approx(16 / found["total_s"])
    assert found["total_s"] == pytest.approx(found["prefill_s"] + found["decode_s"])
    assert found["phases"].keys() == {"prefill", "decode"}
    for lane, seconds in found["lanes"].items():
        assert seconds == pytest.approx(sum(lanes.get(lane, 0) for lanes in found["phases"].values()))
    bound = sum(max(lanes.values()) for lanes in found["phases"].values())
    assert found["bound_share"] == pytest.approx(bound / found["total_s"])
    card = capsys.readouterr().out
    assert f"{found['throughput_tokens_s']:,.1f} tokens/s" in card
    events = json.loads(trace.read_text())["traceEvents"]
    lanes = {e["args"]["name"] for e in events if e["ph"] == "M"}
    assert {"compute", "disk_read", "disk_write"} <= lanes
    # Every cell computes once: 4 tokens, 6 layers, 2 batches.
    assert sum(e["ph"] == "X" and e["cat"] == "compute" for e in events) == 4 * 6 * 2


def test_cut_generation_is_projected(tiny_model, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    flags = ["--model", tiny_model, *TINY, "--cut-gen-len", "2", "--no-bound", "--json", str(out)]
    assert bench.main(flags) == 0
    found = json.loads(out.read_text())
    assert found["projected_from"] == 2 and found["gen_len"] == 4
    assert found["bound_share"] is None
    assert "projected from 2 tokens" in capsys.readouterr().out


def test_demo_prints_answers_next_to_the_correct_ones(capsys):
    policy = str(ROOT / "policies" / "demo.toml")
    assert bench.main(["--policy", policy, "--device", "cpu", "--num-prompts", "20", "--no-bound"]) == 0
    out = capsys.readouterr().out
    assert "[correct]" in out and "correct answers: " in out


def test_demo_may_be_timed_on_random_ids(capsys):
    flags = "--device cpu --prompt-len 8 --gen-len 2 --num-prompts 2 --no-bound"
    assert bench.main(flags.split()) == 0
    assert "correct answers" not in capsys.readouterr().out


def test_random_prompts_may_share_a_prefix(capsys):
    flags = "--device cpu --prompt-len 40 --prefix-len 36 --gen-len 2 --num-prompts 4 --no-bound"
    assert bench.main(flags.split()) == 0
    assert "36 tokens, computed once for 4 prompts" in capsys.readouterr().out


def test_rows_may_end_early(capsys, tmp_path):
    flags = "--device cpu --prompt-len 8 --gen-len 12 --num-prompts 12 --gpu-batch-size 2 --num-gpu-batches 2"
    flags += f" --percent 100 0 100 0 100 0 --mean-new 4 --json {tmp_path / 'out'}"
    assert bench.main(flags.split()) == 0
    assert "48 in total" in (card := capsys.readouterr().out) and "of the places in use" in card
    found = json.loads((tmp_path / "out").read_text())
    assert 0 < sum(stage["seconds"] for stage in found["stages"].values()) <= found["total_s"]
    assert 0 < found["stages"]["drain"]["used"] < found["stages"]["fill"]["used"] <= 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--policy nowhere.toml", "nowhere.toml"),
        ("--model nowhere/at/all", "no such directory"),
        ("--device tpu", "device 'tpu' is not known"),
        ("--percent 50 60 0 100 0 100", "110 percent"),
        ("--device emulated:memory=64KiB", "gpu tier"),
        ("--prompt-len 600", "512 positions"),
        ("--cut-gen-len 1", "cut_gen_len is 1"),
        (
            "--cut-gen-len 2 --mean-new 3",
            "--cut-gen-len is 2 and --mean-new is 3: the time of a run whose rows end",
        ),
    ],
)
def test_bad_input_is_one_clear_line(flags, said, capsys):
    assert bench.main(shlex.split(flags)) == 1
    err = capsys.readouterr().err
    assert said in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "flags", ["--gen-len 0", "--gpu-batch-size -1", "--overlap perhaps", "--order nothing"]
)
def test_bad_flags_are_refused(flags, capsys):
    with pytest.raises(SystemExit):
        bench.main(shlex.split(flags))
    assert flags.split()[0] in capsys.readouterr().err
