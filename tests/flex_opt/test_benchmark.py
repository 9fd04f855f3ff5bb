"""The command of 0.1: its flags, output, log and errors."""

import argparse
import dataclasses
import re
import shlex

import pytest

from flexgen.demo import MODEL_DIR
from flexgen.errors import RequestError
from flexgen.flex_opt import (
    BenchmarkResult,
    OptLM,
    add_parser_arguments,
    benchmark,
    get_filename,
    get_test_inputs,
    main,
    read_benchmark_log,
    run_flexgen,
    str2bool,
    write_benchmark_log,
)

LOG = re.compile(
    r"model size: \d+\.\d{3} GB\tcache size: \d+\.\d{3} GB\thidden size \(p\): \d+\.\d{3} GB\n"
    r"peak gpu mem: \d+\.\d{3} GB\tprojected: (True|False)\n"
    r"prefill latency: (\d+\.\d{3}) s\tprefill throughput: (\d+\.\d{3}) token/s\n"
    r"decode latency: (\d+\.\d{3}) s\tdecode throughput: (\d+\.\d{3}) token/s\n"
    r"total latency: (\d+\.\d{3}) s\ttotal throughput: (\d+\.\d{3}) token/s\n"
)
DEFAULTS = dict(
    model="facebook/opt-6.7b", path="~/opt_weights", offload_dir="~/flexgen_offload_dir", prompt_len=512,
    gen_len=32, cut_gen_len=None, debug_mode=None, gpu_batch_size=4, num_gpu_batches=1,
    percent=[100, 0, 100, 0, 100, 0], sep_layer=True, pin_weight=True, overlap=True, cpu_cache_compute=False,
    attn_sparsity=1.0, compress_weight=False, compress_cache=False, log_file="auto", no_log=False, verbose=2,
)  # fmt: skip


def parse(*flags):
    parser = argparse.ArgumentParser()
    add_parser_arguments(parser)
    return parser.parse_args(flags)


@pytest.fixture
def tiny_flags(tiny, tmp_path, monkeypatch):
    """Flags that run the tiny model in an empty directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return (
        f"--model opt-tiny --path {tiny.hf}/opt-tiny --offload-dir offload --prompt-len 6 --gen-len 4".split()
    )


def test_flags_and_their_defaults():
    assert vars(parse()) == DEFAULTS
    assert parse("--overlap", "--pin-weight", "0", "--sep-layer", "false").pin_weight is False


def test_every_flag_at_once(tiny_flags, tmp_path, capsys):
    flags = (
        "--gpu-batch-size 3 --num-gpu-batches 2 --percent 10 50 0 100 0 0 --sep-layer false --pin-weight 0"
    )
    flags += " --cpu-cache-compute --attn-sparsity 1.0 --compress-weight --compress-cache --overlap true"
    flags += " --cut-gen-len 2 --debug-mode fewer_batch --log-file my.log --verbose 1"
    given = [*tiny_flags, *flags.split()]
    named = {flag[2:].replace("-", "_") for flag in given if flag.startswith("--")}
    assert named == set(DEFAULTS) - {"no_log"}
    assert main(given) == 0
    text = (tmp_path / "my.log").read_text()
    assert LOG.fullmatch(text)[1] == "True"
    out = capsys.readouterr().out
    assert text in out and "Outputs" not in out
    lines = out.splitlines()
    assert lines[0] == "<run_flexgen>: args.model: opt-tiny"
    assert re.fullmatch(r"model size: \S+ GB, cache size: \S+ GB, hidden size \(prefill\): \S+ GB", lines[1])
    assert [line for line in lines if line.endswith(("...", "generate"))] == [
        "init weight...", "warmup - generate", "benchmark - generate"
    ]  # fmt: skip


def test_the_log_is_named_for_the_flags_and_grows(tiny_flags, tmp_path, capsys):
    name = "fo-tiny-gbs4-ngbs1-prompt6-gen4-percent-100-0-100-0-100-0-gpu-cache.log"
    for runs in (1, 2):
        assert main([*tiny_flags, "--verbose", "0"]) == 0
        assert "latency" not in capsys.readouterr().out
        assert len(LOG.findall((tmp_path / name).read_text())) == runs
    found = LOG.match((tmp_path / name).read_text())
    assert found[1] == "False"
    result = read_benchmark_log(tmp_path / name)
    assert result == BenchmarkResult(*map(float, found.groups()[1:]))
    # Figures are rounded to a millisecond.
    assert result.total_latency == pytest.approx(result.prefill_latency + result.decode_latency, abs=2e-3)


def test_flags_become_a_policy_and_a_run_becomes_figures(tiny_flags, monkeypatch):
    models, logged = [], []

    class Kept(OptLM):
        def __init__(self, *args):
            super().__init__(*args)
            models.append(self)

    monkeypatch.setattr(benchmark, "OptLM", Kept)
    monkeypatch.setattr(benchmark, "write_benchmark_log", lambda *row: logged.append(row) or "")
    flags = "--gpu-batch-size 3 --num-gpu-batches 2 --percent 10 20 30 40 50 5 --sep-layer 0 --pin-weight 0"
    flags += " --overlap 0 --cpu-cache-compute --compress-weight --compress-cache --cut-gen-len 3 --no-log"
    assert main([*tiny_flags, *flags.split()]) == 0
    (model,), ((file, *_, gpu_peak, projected, prefill, rate, decode, decode_rate, total, total_rate),) = (
        models,
        logged,
    )
    assert dataclasses.astuple(model.policy)[:14] == (
        3, 2, 10, 20, 30, 40, 50, 5, False, False, False, True, 1.0, True
    )  # fmt: skip
    assert model.policy.compress_cache and model.policy.comp_weight_config.group_dim == 0
    assert (model.task.prompt_len, model.task.gen_len, model.task.cut_gen_len) == (6, 4, 3)
    assert model.stats.num_prompts == 6 and model.stats.prompt_tokens == 36
    assert (file, gpu_peak, projected) == (None, 0, True)
    assert prefill == model.stats.timing.prefill
    assert decode == pytest.approx(model.stats.timing.decode * 3 / 2), "two of three later tokens ran"
    assert total == pytest.approx(prefill + decode)
    assert [prefill * rate, decode * decode_rate, total * total_rate] == pytest.approx([6 * 6, 6 * 3, 6 * 4])
    with pytest.raises(RequestError, match="closed"):
        model.generate([[5]], 1)


@pytest.mark.parametrize("verbose", [1, 2])
def test_texts_then_devices_then_the_log_are_printed(verbose, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = f"--model {MODEL_DIR.name} --path {MODEL_DIR.parent} --offload-dir offload --prompt-len 12 --gen-len 2"
    assert main([*flags.split(), "--gpu-batch-size", "2", "--no-log", "--verbose", str(verbose)]) == 0
    lines = capsys.readouterr().out.splitlines()
    begin = lines.index("benchmark - generate") + 1
    found = [line.partition(":")[0] for line in lines[begin:] if line[:1].isalpha()]
    log = ["model size", "peak gpu mem", "prefill latency", "decode latency", "total latency"]
    assert found == ["Outputs"] * (verbose == 2) + ["TorchDevice"] * 2 + log
    assert sum(line.startswith(("0: ", "1: ")) for line in lines) == (2 if verbose == 2 else 0)


def test_no_log_writes_none(tiny_flags, tmp_path):
    assert main([*tiny_flags, "--no-log"]) == 0
    assert not list(tmp_path.glob("*.log"))


def test_arguments_of_a_script(tiny_flags, tmp_path, capsys):
    run_flexgen(parse(*tiny_flags, "--gen-len", "1", "--log-file", "one.log"))
    result = read_benchmark_log(tmp_path / "one.log")
    assert (result.decode_latency, result.decode_throughput) == (0, 0)


def test_breakdown_prints_its_table(tiny_flags, capsys):
    assert main([*tiny_flags, "--debug-mode", "breakdown", "--no-log"]) == 0
    out = capsys.readouterr().out
    assert "compute_layer_decoding (per-batch)" in out and "projected: True" in out


def test_names_of_logs():
    args = parse(*"--model facebook/opt-iml-30b --percent 0 20 30 40 0 5".split())
    assert get_filename(args) == "fo-30b-gbs4-ngbs1-prompt512-gen32-percent-0-20-30-40-0-5-gpu-cache"
    args = parse("--cpu-cache-compute", "--compress-weight", "--compress-cache")
    assert get_filename(args).endswith("-percent-100-0-100-0-100-0-cpu-cache-compw-compc")


def test_a_log_reads_back(tmp_path):
    figures = [0.5, 100.0, 1.25, 40.125, 1.75, 58.0]
    text = write_benchmark_log(tmp_path / "log", 1 << 30, 2 << 30, 3 << 29, 0, True, *figures)
    assert text.startswith("model size: 1.000 GB\tcache size: 2.000 GB\thidden size (p): 1.500 GB\n")
    assert LOG.fullmatch(text + "\n")
    assert read_benchmark_log(tmp_path / "log") == BenchmarkResult(*figures)


def test_inputs_are_padded_by_the_tokenizer():
    class Tokenizer:
        def __call__(self, prompts, padding, max_length):
            assert padding == "max_length" and len(prompts) == 1
            return argparse.Namespace(input_ids=[[1] * (max_length - 3) + [4, 5, 6]])

    assert get_test_inputs(5, 3, Tokenizer()) == ([1, 1, 4, 5, 6],) * 3


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--percent 100 0 100 0", "4 numbers"),
        ("--percent 60 60 100 0 100 0", "120 percent"),
        ("--model opt-31b", "did you mean 'opt-30b'"),
        ("--model opt-125m", "2, but opt-125m has 12"),
        ("--compress-cache --attn-sparsity 0.1", "attn_sparsity is 0.1"),
        ("--gpu-batch-size 0", "gpu_batch_size is 0"),
        ("--prompt-len 0", "--prompt-len is 0"),
        ("--gen-len 0", "--gen-len is 0"),
        ("--cut-gen-len 1", "cut_gen_len is 1"),
        ("--prompt-len 64", "64 positions"),
        ("--log-file no/such/folder.log", "no directory no/such"),
    ],
)
def test_bad_input_is_one_clear_line(flags, said, tiny_flags, capsys):
    assert main([*tiny_flags, *shlex.split(flags)]) == 1
    err = capsys.readouterr().err
    assert said in err and len(err.strip().splitlines()) == 1


def test_truth():
    assert all(map(str2bool, ("yes", "True", "t", "Y", "1", True)))
    assert not any(map(str2bool, ("no", "False", "f", "N", "0", False)))
    with pytest.raises(argparse.ArgumentTypeError, match="perhaps"):
        str2bool("perhaps")
