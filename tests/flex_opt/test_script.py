"""A script for FlexGen 0.1, run unchanged in a separate process."""

import json
import os
import subprocess
import sys

import pytest

from flexgen.demo import MODEL_DIR

SCRIPT = """
import argparse
import dataclasses
import json

import numpy as np

from flexgen.compression import CompressionConfig
from flexgen.flex_opt import OptLM, Policy
from flexgen.opt_config import get_opt_config
from flexgen.pytorch_backend import TorchDevice, TorchDisk, TorchMixedDevice
from flexgen.timer import timers
from flexgen.utils import GB, ExecutionEnv, T, Task, str2bool


def run(args):
    env = ExecutionEnv.create(args.offload_dir)
    policy = Policy(
        len(args.prompts), 1, args.percent[0], args.percent[1], args.percent[2], args.percent[3],
        args.percent[4], args.percent[5], overlap=True, sep_layer=True, pin_weight=args.pin_weight,
        cpu_cache_compute=args.cpu_cache_compute, attn_sparsity=1.0, compress_weight=args.compress_weight,
        comp_weight_config=CompressionConfig(num_bits=4, group_size=64, group_dim=0, symmetric=False),
        compress_cache=args.compress_cache,
        comp_cache_config=CompressionConfig(num_bits=4, group_size=64, group_dim=2, symmetric=False),
    )
    config = get_opt_config(
        "facebook/opt-125m", num_hidden_layers=2, max_seq_len=64, hidden_size=64, n_head=4, input_dim=64,
        ffn_embed_dim=96, vocab_size=96, dtype=np.float32,
    )
    config = dataclasses.replace(config, name="opt-tiny")
    model = OptLM(config, env, args.path, policy)
    timers("generate").reset()
    output_ids = model.generate(args.prompts, do_sample=False, temperature=0.7, max_new_tokens=8, stop=None)
    tokens = len(timers("generate").costs)
    print(json.dumps([policy.cache_disk_percent, tokens, type(output_ids).__name__, output_ids.tolist()]))
    env.close_copy_threads()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--path", default="~/opt_weights")
    parser.add_argument("--offload-dir", default="~/flexgen_offload_dir")
    parser.add_argument("--prompts", type=json.loads)
    parser.add_argument("--percent", nargs="+", type=int, default=[100, 0, 100, 0, 100, 0])
    parser.add_argument("--pin-weight", type=str2bool, nargs="?", const=True, default=True)
    parser.add_argument("--cpu-cache-compute", action="store_true")
    parser.add_argument("--compress-weight", action="store_true")
    parser.add_argument("--compress-cache", action="store_true")
    run(parser.parse_args())
"""
PROMPTS = [[1, 1, 5, 6, 7], [8, 9, 10, 11, 12], [1, 13, 14, 15, 16]]


def run(command, cwd):
    quiet = {key: value for key, value in os.environ.items() if key != "PYTHONWARNINGS"}
    done = subprocess.run([sys.executable, *command], cwd=cwd, env=quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("package", ["flexgen", "flexllmgen"])
def test_it_runs_unchanged_and_names_the_new_interface_once(package, tiny, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("from flexgen.", f"from {package}."))
    flags = f"--path {tiny.path} --offload-dir offload --percent 0 50 0 50 0 100 --cpu-cache-compute".split()
    done = run([str(script), *flags, "--pin-weight", "0", "--prompts", json.dumps(PROMPTS)], tmp_path)
    disk, tokens, kind, ids = json.loads(done.stdout)
    assert (disk, tokens, kind) == (50, 8, "ndarray")
    assert ids == tiny.greedy(PROMPTS, 8).tolist()
    # Python shows it without being asked, because it is of a line of the script that was started.
    assert done.stderr.count("DeprecationWarning") == 1
    assert "script.py" in done.stderr and "flexgen.OptLM" in done.stderr


@pytest.mark.parametrize("package", ["flexgen", "flexllmgen"])
def test_the_module_runs_as_a_command(package, tiny, tmp_path):
    flags = f"--model opt-tiny --path {tiny.hf} --offload-dir offload --prompt-len 4 --gen-len 3 --verbose 1".split()
    done = run(["-W", "always", "-m", f"{package}.flex_opt", *flags], tmp_path)
    assert "total throughput: " in done.stdout
    assert done.stderr.count("DeprecationWarning: flexgen.flex_opt") == 1
    assert len(list(tmp_path.glob("fo-tiny-*.log"))) == 1
    assert run(["-m", f"{package}.flex_opt", "--help"], tmp_path).stdout.startswith(
        f"usage: python -m {package}.flex_opt "
    )


COMPLETION = """
import argparse
import json

from transformers import AutoTokenizer

from flexgen.flex_opt import CompressionConfig, ExecutionEnv, OptLM, Policy, str2bool

parser = argparse.ArgumentParser()
parser.add_argument("--model", type=str, default="facebook/opt-6.7b")
parser.add_argument("--path", type=str, default="~/opt_weights")
parser.add_argument("--offload-dir", type=str, default="~/flexgen_offload_dir")
parser.add_argument("--percent", nargs="+", type=int, default=[100, 0, 100, 0, 100, 0])
parser.add_argument("--pin-weight", type=str2bool, nargs="?", const=True, default=True)
parser.add_argument("--compress-weight", action="store_true")
args = parser.parse_args()

texts = ["The sun is", "Water boils at one hundred degrees. The moon is"]
packed = CompressionConfig(num_bits=4, group_size=64, group_dim=0, symmetric=False)
policy = Policy(
    len(texts), 1, *args.percent, overlap=True, sep_layer=True, pin_weight=args.pin_weight,
    cpu_cache_compute=False, attn_sparsity=1.0, compress_weight=args.compress_weight, comp_weight_config=packed,
    compress_cache=False, comp_cache_config=packed,
)
env = ExecutionEnv.create(args.offload_dir)
tokenizer = AutoTokenizer.from_pretrained("facebook/opt-30b", padding_side="left")
tokenizer.add_bos_token = False
newline = tokenizer("\\n").input_ids[0]
model = OptLM(args.model, env, args.path, policy)
ids = model.generate(
    tokenizer(texts, padding="max_length", max_length=64).input_ids,
    do_sample=True, temperature=0.7, max_new_tokens=16, stop=newline,
)
texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
print(json.dumps([texts, ids[:, 64:].tolist(), newline, tokenizer.pad_token_id]))
env.close_copy_threads()
"""


@pytest.mark.parametrize("package", ["flexgen", "flexllmgen"])
def test_a_script_that_completes_texts_runs_unchanged(package, tmp_path, monkeypatch):
    """One like 0.1's own app: texts padded by OPT's tokenizer, which is found by its name, draws, a stop id."""
    snapshot = tmp_path / "hub" / "models--facebook--opt-30b" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (snapshot / name).symlink_to(MODEL_DIR / name)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    script = tmp_path / "completion.py"
    script.write_text(COMPLETION.replace("from flexgen.", f"from {package}."))
    done = run(
        [str(script), "--model", "demo", "--offload-dir", "offload", "--percent", *"0 50 0 50 0 100".split()],
        tmp_path,
    )
    texts, made, newline, pad = json.loads(done.stdout)
    assert [
        text.startswith(prompt) for text, prompt in zip(texts, ("The sun", "Water boils"), strict=True)
    ] == [True] * 2
    for row in made:
        assert len(row) == 16
        # What is drawn differs from run to run, and with it whether a row has a stop.
        stop = row.index(newline) if newline in row else 15
        assert set(row[stop + 1 :]) <= {pad}
