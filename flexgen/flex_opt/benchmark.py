"""The benchmark of FlexGen 0.1, with its flags, output and log.

python -m flexgen.flex_opt --model facebook/opt-1.3b --path _DUMMY_ --percent 0 100 100 0 100 0
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from flexgen.cli.flags import run
from flexgen.cli.help import HelpFormatter
from flexgen.errors import RequestError, shown
from flexgen.flex_opt.environment import ExecutionEnv
from flexgen.flex_opt.model import OptLM
from flexgen.flex_opt.places import DUMMY_WEIGHT, read_config
from flexgen.flex_opt.policy import CompressionConfig, Policy
from flexgen.policy import Tier
from flexgen.runtime.debug import BREAKDOWN, FEWER_BATCH, projected_decode, tokens_to_run
from flexgen.units import GIB, KIB, MIB

KB, MB, GB = KIB, MIB, GIB
"""The units of 0.1's output and logs."""
T = 1e12
"""0.1's name for 10 ** 12, mostly for flops."""

_PROMPT = "The largest planet of the solar system is"
_WARM_UP_LEN = 32
_TOKENIZER = "facebook/opt-30b"
"""All sizes of OPT share its tokenizer."""
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
_TRUE, _FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")


@dataclass(frozen=True)
class BenchmarkResult:
    """The figures of a log: seconds, and tokens per second."""

    prefill_latency: float
    prefill_throughput: float
    decode_latency: float
    decode_throughput: float
    total_latency: float
    total_throughput: float


def run_cmd(cmd: str) -> None:
    """Print a shell command and run it. Its exit status is ignored, as in 0.1."""
    print(cmd)
    subprocess.run(cmd, shell=True, check=False)


def str2bool(value: str | bool) -> bool:
    """Parse "yes", "true", "t", "y", "1" and their opposites as a boolean, for argparse."""
    if isinstance(value, bool):
        return value
    if value.lower() not in _TRUE + _FALSE:
        raise argparse.ArgumentTypeError(f"{shown(value)} is not a boolean; write true or false")
    return value.lower() in _TRUE


def get_test_inputs(prompt_len: int, num_prompts: int, tokenizer: Any) -> tuple[list[int], ...]:
    """The ids of one sentence, padded to `prompt_len` by the tokenizer, repeated `num_prompts` times."""
    ids = tokenizer([_PROMPT], padding="max_length", max_length=prompt_len).input_ids[0]
    return (ids,) * num_prompts


def get_filename(args: argparse.Namespace) -> str:
    """The name of a run's log, without ".log": model size, batches, lengths, percentages and enabled options."""
    percent = "".join(f"{value}-" for value in args.percent)
    parts = [
        f"fo-{args.model.split('-')[-1]}-gbs{args.gpu_batch_size}-ngbs{args.num_gpu_batches}-",
        f"prompt{args.prompt_len}-gen{args.gen_len}-percent-{percent}",
        "cpu-cache" if args.cpu_cache_compute else "gpu-cache",
        "-compw" if args.compress_weight else "",
        "-compc" if args.compress_cache else "",
    ]
    return "".join(parts)


def write_benchmark_log(
    filename: str | Path | None,
    model_size: float,
    cache_size: float,
    hidden_size: float,
    gpu_peak_mem: float,
    projected: bool,
    prefill_latency: float,
    prefill_throughput: float,
    decode_latency: float,
    decode_throughput: float,
    total_latency: float,
    total_throughput: float,
) -> str:
    """Append a run to a log, if `filename` is given, and return its lines. Sizes in bytes, times in seconds."""
    rows = [
        [f"model size: {model_size / GB:.3f} GB", f"cache size: {cache_size / GB:.3f} GB"],
        [f"peak gpu mem: {gpu_peak_mem / GB:.3f} GB", f"projected: {projected}"],
        *(
            [f"{phase} latency: {seconds:.3f} s", f"{phase} throughput: {rate:.3f} token/s"]
            for phase, seconds, rate in (
                ("prefill", prefill_latency, prefill_throughput),
                ("decode", decode_latency, decode_throughput),
                ("total", total_latency, total_throughput),
            )
        ),
    ]
    rows[0].append(f"hidden size (p): {hidden_size / GB:.3f} GB")
    text = "\n".join("\t".join(row) for row in rows)
    if filename is not None:
        with open(filename, "a", encoding="utf-8") as file:
            file.write(text + "\n")
    return text


def read_benchmark_log(filename: str | Path) -> BenchmarkResult:
    """The times of the first run in a log."""
    lines = Path(filename).read_text(encoding="utf-8").splitlines()
    # "prefill latency: 1.5 s<tab>prefill throughput: 2.5 token/s"
    values = [float(part.split(": ")[1].split(" ")[0]) for line in lines[2:5] for part in line.split("\t")]
    return BenchmarkResult(*values)


def add_parser_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of 0.1's benchmark. `run_flexgen` reads them."""
    add = parser.add_argument
    add("--model", default="facebook/opt-6.7b", help="name of an OPT model or of a directory in --path")
    add("--path", default="~/opt_weights", help=f"directory of the weights; {DUMMY_WEIGHT}: random weights")
    add("--offload-dir", default="~/flexgen_offload_dir", help="directory of the disk tier")
    add("--prompt-len", type=int, default=512, metavar="N", help="tokens of each prompt")
    add("--gen-len", type=int, default=32, metavar="N", help="new tokens of each prompt")
    add("--cut-gen-len", type=int, metavar="N", help="run only N tokens and extrapolate the decode time")
    add(
        "--debug-mode",
        choices=[FEWER_BATCH, BREAKDOWN],
        help=f"{FEWER_BATCH}: extrapolate from a few tokens; {BREAKDOWN}: also print a table of costs",
    )
    add("--gpu-batch-size", type=int, default=4, metavar="N", help="prompts in a batch")
    add("--num-gpu-batches", type=int, default=1, metavar="N", help="batches in a block")
    add(
        "--percent",
        nargs="+",
        type=int,
        default=[100, 0, 100, 0, 100, 0],
        help="percent of weights (GPU, CPU), cache (GPU, CPU) and activations (GPU, CPU); the rest is on disk",
    )
    for name, what in (
        ("--sep-layer", "stream attention and MLP as separate layers"),
        ("--pin-weight", "pin host memory, so that a GPU can read it directly"),
        ("--overlap", "overlap transfers with the computation"),
    ):
        add(name, type=str2bool, nargs="?", const=True, default=True, metavar="BOOL", help=what)
    add(
        "--cpu-cache-compute",
        action="store_true",
        help="compute attention on the CPU over cache that is off the GPU",
    )
    add(
        "--attn-sparsity",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="share of the cached values that decoding uses, above 0, at most 1 (exact)",
    )
    add("--compress-weight", action="store_true", help="store weights in 4 bits")
    add("--compress-cache", action="store_true", help="store the cache in 4 bits")
    add(
        "--log-file",
        default="auto",
        metavar="FILE",
        help="append the figures to FILE (default: a name made from the flags)",
    )
    add("--no-log", action="store_true", help="write no log")
    add(
        "--verbose",
        type=int,
        default=2,
        help="0: print no log; 1: print the log; 2: also some generated text",
    )


def run_flexgen(args: argparse.Namespace) -> None:
    """Run the benchmark that the flags describe, print the measured times and append them to a log.

    The prompts have no padding, because padding is not computed: every prompt has `prompt_len` real tokens.
    """
    print(f"<run_flexgen>: args.model: {args.model}")
    if len(args.percent) != 6:
        raise RequestError(f"--percent has {len(args.percent)} numbers; give six")
    config = read_config(args.model, args.path)
    w_gpu, w_cpu, cache_gpu, cache_cpu, act_gpu, act_cpu = args.percent
    policy = Policy(
        args.gpu_batch_size,
        args.num_gpu_batches,
        w_gpu,
        w_cpu,
        cache_gpu,
        cache_cpu,
        act_gpu,
        act_cpu,
        overlap=args.overlap,
        sep_layer=args.sep_layer,
        pin_weight=args.pin_weight,
        cpu_cache_compute=args.cpu_cache_compute,
        attn_sparsity=args.attn_sparsity,
        compress_weight=args.compress_weight,
        comp_weight_config=CompressionConfig(num_bits=4, group_size=64, group_dim=0, symmetric=False),
        compress_cache=args.compress_cache,
        comp_cache_config=CompressionConfig(num_bits=4, group_size=64, group_dim=2, symmetric=False),
    )
    num_prompts = policy.to_policy().block_size
    prompt_len, gen_len = args.prompt_len, args.gen_len
    for name, value in (("--prompt-len", prompt_len), ("--gen-len", gen_len)):
        if value < 1:
            raise RequestError(f"{name} is {value}; it must be at least 1")
    cut = args.cut_gen_len or None
    tokens_to_run(gen_len, cut, args.debug_mode, projected=True)  # raises before weights are loaded
    sizes = (
        config.model_bytes(),
        config.cache_bytes(num_prompts, prompt_len + gen_len),
        config.hidden_bytes(num_prompts, prompt_len + gen_len),
    )
    model_size, cache_size, hidden_size = (f"{size / GB:.3f} GB" for size in sizes)
    print(f"model size: {model_size}, cache size: {cache_size}, hidden size (prefill): {hidden_size}")
    log = None if args.no_log else get_filename(args) + ".log" if args.log_file == "auto" else args.log_file
    if log is not None and not Path(log).parent.is_dir():
        raise RequestError(
            f"--log-file {log}: there is no directory {Path(log).parent}; create it or choose another file"
        )
    env = ExecutionEnv.create(args.offload_dir)
    try:
        print("init weight...")
        model = OptLM(config, env, args.path, policy)
        tokenizer = None if DUMMY_WEIGHT in args.path else _tokenizer(model)
        prompt = _full_prompt(model, tokenizer, prompt_len)
        print("warmup - generate")
        model.generate([prompt[:_WARM_UP_LEN]] * num_prompts, max_new_tokens=1)
        print("benchmark - generate")
        ids = model.generate(
            [prompt] * num_prompts,
            max_new_tokens=gen_len,
            debug_mode=args.debug_mode,
            cut_gen_len=cut,
            verbose=args.verbose,
        )
        assert model.stats is not None
        timing, gpu_peak = model.stats.timing, model.stats.peak_bytes[Tier.GPU]
        if tokenizer is not None and args.verbose >= 2:
            print(_shown(tokenizer, ids))
        env.gpu.print_stats()
        env.cpu.print_stats()
    finally:
        env.close_copy_threads()
    prefill = timing.prefill
    decode = (
        projected_decode(timing, gen_len) or 0.0
    )  # no projection is needed if all tokens ran: nothing stops them
    text = write_benchmark_log(
        log,
        *sizes,
        gpu_peak,
        bool(args.debug_mode or cut),
        prefill,
        num_prompts * prompt_len / prefill,
        decode,
        num_prompts * (gen_len - 1) / max(decode, 1e-10),
        prefill + decode,
        num_prompts * gen_len / (prefill + decode),
    )
    if args.verbose >= 1:
        print(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {_started_as()}",
        formatter_class=HelpFormatter,
        description="The benchmark of FlexGen 0.1, with its flags and its log. `python -m flexgen.bench` is newer: "
        "it supports more models and reports how close a run is to the limit of the hardware.",
    )
    add_parser_arguments(parser)
    return run(parser, run_flexgen, argv)


def _started_as() -> str:
    """The module name given to `python -m`; `flexllmgen.flex_opt` is the same command."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    names = {f"{package}.flex_opt" for package in ("flexgen", "flexllmgen")}
    name = spec.name.removesuffix(".__main__") if spec else ""
    return name if name in names else "flexgen.flex_opt"


def _tokenizer(model: OptLM) -> Any | None:
    """The model's own tokenizer, or OPT's if it is on this machine already, or None."""
    directory = model.engine.tokenizer_dir
    own = directory is not None and any((directory / name).exists() for name in _TOKENIZER_FILES)
    try:
        return transformers.AutoTokenizer.from_pretrained(
            directory if own else _TOKENIZER, padding_side="left", local_files_only=True
        )
    except (OSError, ValueError):
        print(f"no tokenizer in {directory}, and {_TOKENIZER}'s is not on this machine: using random prompts")
        return None


def _full_prompt(model: OptLM, tokenizer: Any | None, prompt_len: int) -> list[int]:
    """`prompt_len` ids without padding: a repeated sentence, or random ids."""
    config = model.config
    if tokenizer is not None:
        first, *rest = tokenizer(_PROMPT).input_ids
        return ([first] + rest * (prompt_len // len(rest) + 1))[:prompt_len]
    ids = np.delete(np.arange(config.vocab_size), config.pad_token_id)
    return [int(n) for n in np.random.default_rng(0).choice(ids, prompt_len)]


def _shown(tokenizer: Any, ids: np.ndarray) -> str:
    """The first and the last text."""
    rule = "-" * 70
    texts = tokenizer.batch_decode(ids[[0, -1]], skip_special_tokens=True)
    numbered = [f"{n}: {text}\n{rule}" for n, text in zip((0, len(ids) - 1), texts, strict=True)]
    return "\n".join(["Outputs:", rule, *numbered])
