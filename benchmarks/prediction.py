"""Compare predicted with measured throughput on this machine.

    python benchmarks/prediction.py --offload-dir DIR

A round measures the machine (like `python -m flexgen.measure`), runs every policy once, and measures the machine
again. The policies are predicted from these two measurements, as the mean of both predictions. The speed of a shared
machine changes every minute, so each round is evaluated on its own: the figure of a policy is the median over its
rounds of measured over predicted seconds. The model has four layers of the OPT-1.3B shape with random weights; it
runs on the CPU and on an emulated device with limited links. Target: an error of at most 10% in the median and 25% in
the worst case. DIR should be on a real disk; it needs up to 2 GB. A round takes about four minutes for each device.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
from record import RESULTS, load_results, save
from transformers import OPTConfig

from flexgen import OptLM, Policy
from flexgen.models import open_model
from flexgen.predict.hardware import Hardware
from flexgen.predict.prediction import predict
from flexgen.probe.measured import measured
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


PHASES = ("seconds", "prefill_s", "decode_s")


def run(name: str, folder: str) -> dict[str, Any]:
    """Run a policy once."""
    case, policy = CASES[name], CASES[name].policy
    prompts = np.random.default_rng(0).integers(4, 50_000, size=(policy.block_size, case.prompt_len))
    with OptLM(
        MODEL, policy, device=case.device, dtype=case.dtype, weights="dummy", offload_dir=folder, order=case.order,
        progress=False,
    ) as model:  # fmt: skip
        model.generate(prompts[: policy.gpu_batch_size], 2, stop=())  # creates threads and touches pages
        before = psutil.cpu_times()
        model.generate(prompts, case.new_tokens, stop=())
        after = psutil.cpu_times()
        assert model.stats is not None
        timing = model.stats.timing
        return {
            "seconds": timing.total, "prefill_s": timing.prefill, "decode_s": timing.decode,
            "stolen": stolen(before, after),
            "order": model.stats.order,
            "busy_s": {str(lane): seconds for lane, seconds in timing.trace.busy().items()},
        }  # fmt: skip


def stolen(before: Any, after: Any) -> float:
    """The share of the processor time that other guests of the same host used; 0 if it is not reported."""
    took = sum(after) - sum(before)
    return (getattr(after, "steal", 0.0) - getattr(before, "steal", 0.0)) / took if took else 0.0


def a_round(
    device: str, names: Sequence[str], folder: str, before: Hardware
) -> tuple[dict[str, Any], Hardware]:
    """Run each policy, then measure the machine again. `before`: the measurement before the runs."""
    runs = {}
    for name in names:
        runs[name] = run(name, folder)
        foretold = foresee(CASES[name], [before])["seconds"]
        print(
            f"{name:<44}{runs[name]['seconds']:>8.2f} s, predicted {foretold:>8.2f}; "
            f"{runs[name]['stolen']:.0%} of the processors stolen",
            file=sys.stderr,
            flush=True,
        )
    behind = measured(device, folder, again=True)
    return {"device": device, "hardware": [before.to_dict(), behind.to_dict()], "runs": runs}, behind


def foresee(case: Case, machine: Sequence[Hardware]) -> dict[str, Any]:
    """The mean of the predictions from each measurement of the machine, for one run of a policy."""
    spec, _ = open_model(MODEL, "dummy")
    workload = Workload(case.prompt_len, case.new_tokens, case.policy.block_size)
    predictions = [
        predict(spec, case.policy, hardware, workload, dtype=case.dtype, order=case.order)
        for hardware in machine
    ]
    foretold: dict[str, Any] = {
        phase: statistics.mean(getattr(each.report, phase) for each in predictions) for phase in PHASES[1:]
    }
    return foretold | {
        "seconds": foretold["prefill_s"] + foretold["decode_s"],
        "by_measurement": [each.report.total_s for each in predictions],
        "busy_s": {str(lane): seconds for lane, seconds in predictions[-1].trace().busy().items()},
    }


def compare(name: str, rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Measured over predicted seconds of a policy: medians over its rounds."""
    case, pairs = CASES[name], []
    for each in rounds:
        if name in each["runs"]:
            machine = [Hardware.from_dict(found, each["device"]) for found in each["hardware"]]
            pairs.append((each["runs"][name], foresee(case, machine)))
    ratios = {
        phase.removesuffix("_s"): [took[phase] / foretold[phase] for took, foretold in pairs]
        for phase in PHASES
    }
    return {
        "device": case.device, "policy": case.policy.to_dict(), "dtype": case.dtype,
        "prompt_len": case.prompt_len, "gen_len": case.new_tokens,
        "ratio": statistics.median(ratios["seconds"]),
        "prefill_ratio": statistics.median(ratios["prefill"]),
        "decode_ratio": statistics.median(ratios["decode"]),
        "by_round": [
            {"ratio": ratio, "stolen": took["stolen"], "measured_s": took["seconds"], "predicted": foretold}
            for ratio, (took, foretold) in zip(ratios["seconds"], pairs, strict=True)
        ],
    }  # fmt: skip


def summary(figures: dict[str, Any]) -> dict[str, Any]:
    errors = [abs(found["ratio"] - 1) for found in figures.values()]
    return {
        "cases": len(errors),
        "median_error": statistics.median(errors),
        "worst_error": max(errors),
        "target": {"median_error": MEDIAN, "worst_error": WORST},
        "within_target": statistics.median(errors) <= MEDIAN and max(errors) <= WORST,
    }


def write(path: Path, rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Compute all figures from the rounds."""
    figures = {name: compare(name, rounds) for name in CASES if any(name in each["runs"] for each in rounds)}
    document = {
        "model": "4 layers of the OPT-1.3B shape, random weights",
        "ratio": "measured over predicted seconds, median over the rounds",
        "summary": summary(figures),
        "figures": figures,
        "rounds": rounds,
    }
    save("prediction", document, path)
    return document


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--offload-dir", required=True)
    add("--rounds", type=int, default=5)
    add("--case", choices=CASES, action="append", help="run only this case (may be repeated)")
    add("--device", choices=("cpu", "emulated"), help="run only the cases of this device")
    add(
        "--resume",
        action="store_true",
        help="add rounds to those in the results, and predict all of them again",
    )
    add("--out", help="write the results to this file")
    args = parser.parse_args()
    path = Path(args.out) if args.out else RESULTS / "prediction.json"
    rounds: list[dict[str, Any]] = load_results(path).get("rounds", []) if args.resume else []
    names = [name for name in args.case or CASES if CASES[name].device.startswith(args.device or "")]
    for device, some in itertools.groupby(names, lambda name: CASES[name].device):
        wanted, machine = list(some), measured(device, args.offload_dir, again=True)
        for _ in range(args.rounds):
            found, machine = a_round(device, wanted, args.offload_dir, machine)
            rounds.append(found)
            write(path, rounds)
    document = write(path, rounds)
    for name, found in document["figures"].items():
        ratios = " ".join(f"{each['ratio']:.2f}" for each in found["by_round"])
        print(
            f"{name:<44}{found['ratio']:>6.2f}  prefill {found['prefill_ratio']:.2f}  decode "
            f"{found['decode_ratio']:.2f}  ({ratios})"
        )
    summary = document["summary"]
    print(
        f"{summary['cases']} policies: median error {summary['median_error']:.1%}, worst {summary['worst_error']:.1%}"
    )
    print(path)


if __name__ == "__main__":
    main()
