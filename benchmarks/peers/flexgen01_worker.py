"""One run of the PyPI package flexgen 0.1.8, the paper's own code, on a GPU with random weights.

    PYTHONPATH=DIR python flexgen01_worker.py --model facebook/opt-30b --percent 20 80 0 100 0 100 ... --json FILE

gpu.py starts it, with the DIR of `pip install --target DIR`, so that the package's `flexgen` is found first. It takes
the flags of the package's `python -m flexgen.flex_opt`, and writes the seconds of the package's timer to FILE.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

EXPECTED = "0.1.8"
PADDING = 1


class Tokenizer:
    """A replacement for OPT's tokenizer, which would need the network. It returns arbitrary ids."""

    pad_token_id = PADDING

    def __call__(self, prompts: list[str], padding: str, max_length: int) -> Any:
        ids = [[2, *(3 + n % 50_000 for n in range(max_length - 1))] for _ in prompts]
        return SimpleNamespace(input_ids=ids)

    @classmethod
    def from_pretrained(cls, *_: Any, **__: Any) -> Tokenizer:
        return cls()


def main() -> None:
    if (found := version("flexgen")) != EXPECTED:
        raise SystemExit(
            f"the first flexgen on the path is {found}, not {EXPECTED}: set PYTHONPATH to its directory"
        )
    from flexgen import flex_opt  # the peer's
    from flexgen.timer import timers

    parser = argparse.ArgumentParser(description=__doc__)
    flex_opt.add_parser_arguments(parser)
    parser.add_argument(
        "--gpu-memory-gib", type=float, required=True, help="memory limit of torch on the GPU"
    )
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    args.path, args.no_log, args.log_file = flex_opt.DUMMY_WEIGHT, True, "/dev/null"
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, args.gpu_memory_gib * 2**30 / total))
    flex_opt.AutoTokenizer = Tokenizer

    flex_opt.run_flexgen(args)
    # One entry per token; the first is the prefill. Each ends with a wait for the GPU.
    prefill_s, *decode_s = timers("generate").costs
    prompts = args.gpu_batch_size * args.num_gpu_batches
    report = {
        "model": args.model,
        "prompt_len": args.prompt_len,
        "gen_len": args.gen_len,
        "num_prompts": prompts,
        "prefill_s": prefill_s,
        "decode_s": sum(decode_s),
        "prefill_tokens_s": prompts * args.prompt_len / prefill_s,
        "decode_tokens_s": prompts * len(decode_s) / sum(decode_s),
        "throughput_tokens_s": prompts * args.gen_len / (prefill_s + sum(decode_s)),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated(),
    }
    args.json.write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
