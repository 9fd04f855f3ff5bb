"""The share of the bound that each order reaches: the slowest lane of each phase, alone, over the measured time.

    python benchmarks/overlap.py --offload-dir DIR

The cases are: all weights on disk with large and with small batches, and the KV cache on disk. The model has eight
layers of the OPT-1.3B shape with random weights in bfloat16, on the CPU. Its vocabulary is reduced to a third, so
that the head is as large a part as in the whole model. In the case `mixture`, four layers of the Qwen3-30B-A3B shape
are streamed from host memory to an emulated device, over a link of 2 GiB/s. The order `normal` is measured too, for
comparison. DIR should be on a real disk; the first model's 0.9 GB are written there once.

It also reports the share of a run in which the slowest lane of each phase was busy. This share does not depend on the
slowdown of a lane by others, nor on changes of the machine between the run and the measurement of the lanes alone.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections import Counter
from functools import partial
from typing import NamedTuple

import numpy as np
from record import RESULTS, interleaved, load_results, save
from transformers import OPTConfig, PreTrainedConfig, Qwen3MoeConfig

from flexgen import OptLM, Policy
from flexgen.results.bounds import bound_seconds
from flexgen.results.trace import Event, LaneName, Phase

OPT = OPTConfig(
    vocab_size=16_384, hidden_size=2048, ffn_dim=8192, num_hidden_layers=8, num_attention_heads=32,
    word_embed_proj_dim=2048,
)  # fmt: skip
MIXTURE = Qwen3MoeConfig(
    vocab_size=16_384, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_experts=128,
    num_experts_per_tok=8, norm_topk_prob=True, num_hidden_layers=4, num_attention_heads=32, num_key_value_heads=4,
    head_dim=128, max_position_embeddings=2048, mlp_only_layers=[],
)  # fmt: skip
DISK, CPU = {"disk": 100}, {"cpu": 100}


class Case(NamedTuple):
    """A job: its policy, and the numbers of prompt tokens and new tokens."""

    policy: Policy
    prompt_len: int
    new: int
    model: PreTrainedConfig = OPT
    device: str = "cpu"


CASES = {
    "weights on disk, 1 x 4": Case(Policy(gpu_batch_size=4, weights=DISK), 64, 8),
    "weights on disk, 4 x 16": Case(Policy(gpu_batch_size=16, num_gpu_batches=4, weights=DISK), 64, 8),
    "cache on disk, 4 x 8": Case(
        Policy(gpu_batch_size=8, num_gpu_batches=4, weights=CPU, cache=DISK), 128, 16
    ),
    "mixture, 4 x 8": Case(
        Policy(gpu_batch_size=8, num_gpu_batches=4, weights=CPU, sep_layer=False),
        32,
        8,
        MIXTURE,
        "emulated:link=2GiB",
    ),
}


def busiest(events: list[Event]) -> float:
    """The busy seconds of the slowest lane of each phase, in the run itself."""
    seconds: Counter[tuple[Phase, LaneName]] = Counter()
    for event in events:
        phase = Phase.DECODE if event.step.token else Phase.PREFILL
        seconds[phase, event.lane] += event.end - event.start
    return sum(max(taken for (of, _), taken in seconds.items() if of is phase) for phase in Phase)


def run(model: OptLM, prompts: np.ndarray, tokens: int) -> dict[str, float]:
    model.generate(prompts, tokens, stop=())
    assert model.stats is not None
    took = model.stats.timing
    phases = model.lane_seconds(prompts, tokens)
    alone = {f"{phase} {lane}": taken for phase, lanes in phases.items() for lane, taken in lanes.items()}
    whole = {"seconds": took.total, "prefill": took.prefill, "decode": took.decode}
    shares = {"share": bound_seconds(phases) / took.total, "busy": busiest(took.trace.events) / took.total}
    return shares | whole | alone


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--offload-dir", required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--case", choices=CASES, action="append", help="run only this case (may be repeated)")
    parser.add_argument("--resume", action="store_true", help="keep the results of the other cases")
    args = parser.parse_args()
    figures = load_results(RESULTS / "overlap.json").get("figures", {}) if args.resume else {}
    for name in args.case or CASES:
        case = CASES[name]
        size = case.policy.block_size, case.prompt_len
        prompts = np.random.default_rng(0).integers(4, case.model.vocab_size, size=size)
        with contextlib.ExitStack() as stack:
            cases = {}
            for overlap in (True, False):
                model = stack.enter_context(
                    OptLM(
                        case.model,
                        case.policy.replace(overlap=overlap),
                        device=case.device,
                        dtype="bfloat16",
                        weights="dummy",
                        offload_dir=args.offload_dir,
                    )
                )
                model.generate(prompts[:1, :4], 1, stop=())
                cases["overlap" if overlap else "normal"] = partial(run, model, prompts, case.new)
            figures[name] = interleaved(cases, args.repeats)
        document = {
            "model": "8 layers of the OPT-1.3B shape; mixture: 4 layers of Qwen3-30B-A3B; 16,384 tokens, bfloat16",
            "figures": figures,
        }
        path = save("overlap", document)  # later cases may be interrupted
    columns = [(order, what) for order in ("overlap", "normal") for what in ("share", "busy")]
    print(f"{'case':<28}" + "".join(f"{order + ', ' + what:>16}" for order, what in columns))
    for name, found in figures.items():
        shares = (found[order].get(what, {}).get("median", math.nan) for order, what in columns)
        print(f"{name:<28}" + "".join(f"{share:>16.2f}" for share in shares))
    print(path)


if __name__ == "__main__":
    main()
