"""Predicted over measured throughput, and planned over measured bytes, on the machine at hand.

    python benchmarks/prediction.py --offload-dir DIR

The machine is measured (as by `python -m flexgen.measure`), each policy runs, and the machine is measured again;
the same policies are predicted from those figures alone. Because a shared machine is another one from minute to
minute, a prediction is the mean of what each measurement of the machine says. Four layers of the OPT-1.3B shape with
random weights, on the CPU and on an emulated device behind limited links. Target: predictions off by at most 10% in
the median and 25% at worst. DIR should lie on a real disk; it holds up to 2 GB.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from record import RESULTS, interleaved, kept, save
from transformers import OPTConfig

from flexgen import OptLM, Policy, Tier
from flexgen.models import open_model
from flexgen.planning.hardware import Hardware
from flexgen.planning.measured import measured
from flexgen.planning.predict import predict
from flexgen.workload import Workload

MEDIAN, WORST = 0.10, 0.25
MODEL = OPTConfig(
    hidden_size=2048, ffn_dim=8192, num_hidden_layers=4, num_attention_heads=32, word_embed_proj_dim=2048
)  # fmt: skip
LIMITED = "emulated:memory=3GiB,link=4GiB,disk=1GiB"
GPU, CPU, DISK = {"gpu": 100}, {"cpu": 100}, {"disk": 100}


class Case(NamedTuple):
    device: str
    policy: Policy
    prompt_len: int
    new_tokens: int
    dtype: str = "bfloat16"
    order: str | None = None


def _policy(batch: int, batches: int = 1, **fields: Any) -> Policy:
    given: dict[str, Any] = {"weights": CPU, "cache": CPU, "activations": CPU} | fields
    return Policy(gpu_batch_size=batch, num_gpu_batches=batches, **given)


def _coded(codec: str, tier: str = "cpu") -> dict[str, Any]:
    return {tier: {"percent": 100, "codec": codec}}


ON_GPU: dict[str, Any] = {"weights": GPU, "cache": GPU, "activations": GPU}
CASES = {
    "cpu: in memory, 1 x 8": Case("cpu", _policy(8), 64, 16),
    "cpu: in memory, 2 x 16, float32": Case("cpu", _policy(16, 2), 32, 12, "float32"),
    "cpu: long prompts, 1 x 2": Case("cpu", _policy(2), 512, 16),
    "cpu: weights on disk, 1 x 8": Case("cpu", _policy(8, weights=DISK), 64, 8),
    "cpu: weights on disk, 1 x 8, normal": Case("cpu", _policy(8, weights=DISK, overlap=False), 64, 8),
    "cpu: weights on disk, 4 x 8": Case("cpu", _policy(8, 4, weights=DISK), 32, 8),
    "cpu: weights half on disk, 2 x 8": Case("cpu", _policy(8, 2, weights={"cpu": 50, "disk": 50}), 64, 8),
    "cpu: cache on disk, 4 x 8": Case("cpu", _policy(8, 4, cache=DISK), 64, 8),
    "cpu: int4 weights, 1 x 4": Case("cpu", _policy(4, weights=_coded("int4")), 64, 24),
    "cpu: int8 weights on disk, 2 x 24": Case("cpu", _policy(24, 2, weights=_coded("int8", "disk")), 32, 8),
    "cpu: int4 cache, 1 x 32": Case("cpu", _policy(32, cache=_coded("int4")), 64, 12),
    "emulated: in device memory, 2 x 8": Case(LIMITED, _policy(8, 2, **ON_GPU), 64, 12),
    "emulated: weights in host memory, 4 x 8": Case(
        LIMITED, _policy(8, 4, weights=CPU, cache=GPU, activations=GPU), 32, 8
    ),
    "emulated: cache fetched, 2 x 16": Case(LIMITED, _policy(16, 2, weights=GPU, attend_on="gpu"), 64, 12),
    "emulated: host attends, 4 x 16": Case(LIMITED, _policy(16, 4, weights=GPU, sep_layer=False), 64, 12),
    "emulated: weights on disk, int4, 4 x 16": Case(
        LIMITED, _policy(16, 4, weights=_coded("int4", "disk"), cache=GPU, activations=GPU), 32, 12
    ),
    "emulated: all tiers, normal, 2 x 8": Case(
        LIMITED,
        _policy(8, 2, weights={"gpu": 40, "cpu": 30, "disk": 30}, cache=GPU, activations=GPU, overlap=False),
        64,
        8,
    ),
}


def run(model: OptLM, prompts: np.ndarray, tokens: int) -> dict[str, float]:
    model.generate(prompts, tokens, stop=())
    assert model.stats is not None
    timing = model.stats.timing
    return {"seconds": timing.total, "prefill_s": timing.prefill, "decode_s": timing.decode}


def measure(name: str, folder: str, repeats: int) -> dict[str, Any]:
    """What a case takes."""
    case, policy = CASES[name], CASES[name].policy
    prompts = np.random.default_rng(0).integers(4, 50_000, size=(policy.block_size, case.prompt_len))
    with OptLM(
        MODEL, policy, device=case.device, dtype=case.dtype, weights="dummy", offload_dir=folder, order=case.order,
        progress=False,
    ) as model:  # fmt: skip
        model.generate(prompts[: policy.gpu_batch_size], 2, stop=())  # makes threads and touches pages
        found = interleaved({name: partial(run, model, prompts, case.new_tokens)}, repeats)[name]
        assert model.stats is not None
        busy, peak = model.stats.timing.trace.busy(), model.stats.peak_bytes
        order = model.stats.order
    return found | {
        "order": order,
        "busy_s": {str(lane): seconds for lane, seconds in busy.items()},
        "peak_bytes": {str(tier): count for tier, count in peak.items()},
    }


def compare(case: Case, machine: Sequence[Hardware], found: dict[str, Any]) -> dict[str, Any]:
    """What a case took beside what it was to take by the measurements of the machine."""
    spec, _ = open_model(MODEL, "dummy")
    workload = Workload(case.prompt_len, case.new_tokens, case.policy.block_size)
    predictions = [
        predict(spec, case.policy, hardware, workload, dtype=case.dtype, order=case.order)
        for hardware in machine
    ]
    plan = predictions[0].plan
    foretold = {
        phase: statistics.mean(getattr(each.report, phase) for each in predictions)
        for phase in ("prefill_s", "decode_s")
    }
    foretold["seconds"] = foretold["prefill_s"] + foretold["decode_s"]
    ratios = {key.removesuffix("_s"): found[key]["median"] / foretold[key] for key in foretold}
    # The resident set holds an emulated device's memory too.
    peak = found["peak_bytes"][Tier.CPU]
    return {
        "device": case.device, "policy": case.policy.to_dict(), "dtype": case.dtype,
        "prompt_len": case.prompt_len, "gen_len": case.new_tokens,
        "ratio": ratios["seconds"], "prefill_ratio": ratios["prefill"], "decode_ratio": ratios["decode"],
        "memory_ratio": peak / (plan.on(Tier.GPU) + plan.on(Tier.CPU)),
        "measured": found,
        "predicted": foretold
        | {
            "by_measurement": [each.report.total_s for each in predictions],
            "busy_s": {str(lane): seconds for lane, seconds in predictions[-1].trace().busy().items()},
            "planned_bytes": {str(tier): count for tier, count in plan.by_tier.items()},
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--offload-dir", required=True)
    add("--repeats", type=int, default=3)
    add("--case", choices=CASES, action="append", help="only this one (may be repeated)")
    add("--device", choices=("cpu", "emulated"), help="only cases of this device")
    add("--again", action="store_true", help="measure the machine again, before the runs and behind them")
    add(
        "--resume",
        action="store_true",
        help="keep what the results have, but for a --case; all is predicted anew",
    )
    add("--out", help="another file for the results")
    args = parser.parse_args()
    path = Path(args.out) if args.out else RESULTS / "prediction.json"
    before = kept(path) if args.resume else {}
    known = {name: found["measured"] for name, found in before.get("figures", {}).items()}
    machines = {
        device: [Hardware.from_dict(each, device) for each in measurements]
        for device, measurements in before.get("hardware", {}).items()
    }
    figures: dict[str, Any] = {}
    for device, named in itertools.groupby(CASES, lambda name: CASES[name].device):
        wanted = [
            name for name in named
            if name in known or name in (args.case or CASES) and device.startswith(args.device or "")
        ]  # fmt: skip
        if not wanted:
            continue
        if args.again or device not in machines:
            machines.setdefault(device, []).append(measured(device, args.offload_dir, again=args.again))
        runs = [name for name in wanted if name not in known or name in (args.case or ())]
        for name in runs:
            known[name] = measure(name, args.offload_dir, args.repeats)
            _tell(name, compare(CASES[name], machines[device], known[name]))
        if runs and args.again:
            machines[device].append(measured(device, args.offload_dir, again=True))
        for name in wanted:
            figures[name] = compare(CASES[name], machines[device], known[name])
            _tell(name, figures[name])
        document = {
            "model": "4 layers of the OPT-1.3B shape, random weights",
            "ratio": "predicted over measured throughput",
            "summary": summary(figures),
            "hardware": {device: [each.to_dict() for each in found] for device, found in machines.items()},
            "figures": figures,
        }
        save("prediction", document, path)
    told = summary(figures)
    print(
        f"{told['cases']} policies: median error {told['median_error']:.1%}, worst {told['worst_error']:.1%}"
    )
    print(path)


def summary(figures: dict[str, Any]) -> dict[str, Any]:
    errors = [abs(found["ratio"] - 1) for found in figures.values()]
    return {
        "cases": len(errors),
        "median_error": statistics.median(errors),
        "worst_error": max(errors),
        "target": {"median_error": MEDIAN, "worst_error": WORST},
        "within_target": statistics.median(errors) <= MEDIAN and max(errors) <= WORST,
    }


def _tell(name: str, found: dict[str, Any]) -> None:
    took, foretold = found["measured"]["seconds"]["median"], found["predicted"]["seconds"]
    print(
        f"{name:<44}{took:>8.2f} s, predicted {foretold:>8.2f} s, ratio {found['ratio']:.2f} "
        f"(prefill {found['prefill_ratio']:.2f}, decode {found['decode_ratio']:.2f})",
        file=sys.stderr,
        flush=True,
    )


if __name__ == "__main__":
    main()
