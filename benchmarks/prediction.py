"""Compare predicted with measured throughput on this machine.

    python benchmarks/prediction.py --offload-dir DIR [--held-out]

A round measures the machine (like `python -m flexgen.measure`), runs every policy once, and measures the machine
again. The prediction of a policy is the mean of the predictions from these two measurements. The speed of a shared
machine changes every minute, so each round is evaluated on its own: the figure of a policy is the median over its
rounds of measured over predicted seconds. A round is rejected for a policy if the predictions from its two
measurements differ by more than 10%, because then the speed of the machine during the run is not known. It is
rejected for all policies if other programs ran during a measurement. A rejected round remains in the results. To run
its policies again, use --resume and --case.

`prediction_cases.py` has the cases and the targets: those with which the cost model was developed, on the CPU and on
an emulated device with limited links, and with `--held-out` others. DIR should be on a real disk with 5 GB free. A
round takes about four minutes for each device. Results are written after each run, so that --resume continues an
interrupted round with the next policy.
"""

from __future__ import annotations

import argparse
import itertools
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from prediction_cases import DEVELOPED, HELD_OUT, Case, CaseSet
from record import RESULTS, load_results, save

from flexgen import OptLM
from flexgen.models import build_layers, open_model
from flexgen.predict.hardware import Hardware
from flexgen.predict.prediction import predict
from flexgen.probe.measured import measured
from flexgen.results.trace import Trace
from flexgen.workload import Workload

DRIFT = 0.1
"""The largest difference between the predictions from the two measurements of a round that is not rejected."""
PHASES = ("seconds", "prefill_s", "decode_s")


def run(cases: CaseSet, name: str, folder: str) -> dict[str, Any]:
    """Run a policy once."""
    case, policy = cases.cases[name], cases.cases[name].policy
    shape = policy.block_size, case.prompt_len
    prompts = np.random.default_rng(0).integers(4, cases.model.vocab_size, size=shape)
    with OptLM(
        cases.model, policy, device=case.device, dtype=case.dtype, weights="dummy", offload_dir=folder,
        order=case.order, progress=False,
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
            "busy_s": busy(timing.trace, layer_names(cases, case)),
        }  # fmt: skip


def layer_names(cases: CaseSet, case: Case) -> list[str]:
    """The names of the layers, indexed by `Step.layer`."""
    return [layer.name for layer in build_layers(open_model(cases.model, "dummy")[0], case.policy.sep_layer)]


def busy(trace: Trace, names: Sequence[str]) -> dict[str, float]:
    """Seconds of work by phase, lane and kind of layer, such as "decode compute layers.*.mlp".

    The lanes of a run that differ most from the prediction show the cause of an error.
    """
    seconds: Counter[str] = Counter()
    for event in trace.events:
        phase = "prefill" if event.step.token <= 0 else "decode"
        kind = re.sub(r"\d+", "*", names[event.step.layer])
        seconds[f"{phase} {event.lane} {kind}"] += event.end - event.start
    return dict(seconds)


def stolen(before: Any, after: Any) -> float:
    """The share of the processor time that other guests of the same host used; 0 if it is not reported."""
    took = sum(after) - sum(before)
    return (getattr(after, "steal", 0.0) - getattr(before, "steal", 0.0)) / took if took else 0.0


def finish(
    one: dict[str, Any], cases: CaseSet, names: Sequence[str], folder: str, keep: Callable[[], object]
) -> None:
    """Run the policies that a round has not run yet, then measure the machine again. `keep`: called after each."""
    before = Hardware.from_dict(one["hardware"][0], one["device"])
    for name in names:
        if name in one["runs"]:
            continue
        took = one["runs"][name] = run(cases, name, folder)
        foretold = foresee(cases, cases.cases[name], [before])["seconds"]
        print(
            f"{name:<44}{took['seconds']:>8.2f} s, predicted {foretold:>8.2f}; "
            f"{took['stolen']:.0%} of the processors stolen",
            file=sys.stderr,
            flush=True,
        )
        keep()
    one["hardware"].append(measured(one["device"], folder, again=True).to_dict())
    keep()


def unfinished(rounds: Sequence[dict[str, Any]], device: str) -> dict[str, Any] | None:
    """The last round of the device, if it was interrupted."""
    found = [each for each in rounds if each["device"] == device]
    return found[-1] if found and len(found[-1]["hardware"]) == 1 else None


def last_measured(rounds: Sequence[dict[str, Any]], device: str) -> Hardware | None:
    """The last measurement of the device in the results."""
    found = [each["hardware"][-1] for each in rounds if each["device"] == device]
    return Hardware.from_dict(found[-1], device) if found else None


def foresee(cases: CaseSet, case: Case, machine: Sequence[Hardware]) -> dict[str, Any]:
    """The mean of the predictions from each measurement of the machine, for one run of a policy."""
    spec, _ = open_model(cases.model, "dummy")
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
        "busy_s": busy(predictions[-1].trace(), predictions[-1].layer_names),
    }


def drift(foretold: dict[str, Any]) -> float:
    """The difference between the predictions from both measurements of a round, as a share of the smaller one."""
    seconds = foretold["by_measurement"]
    return max(seconds) / min(seconds) - 1


def compare(cases: CaseSet, name: str, rounds: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Measured over predicted seconds of a policy: medians over its rounds. None if all are rejected."""
    case, every, disturbed = cases.cases[name], [], 0
    for each in rounds:
        if name in each["runs"] and any(found["disturbed"] for found in each["hardware"]):
            disturbed += 1
        elif name in each["runs"]:
            machine = [Hardware.from_dict(found, each["device"]) for found in each["hardware"]]
            every.append((each["runs"][name], foresee(cases, case, machine)))
    pairs = [pair for pair in every if drift(pair[1]) <= DRIFT]
    if not pairs:
        return None
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
        "rejected_rounds": disturbed + len(every) - len(pairs),
        "by_round": [
            {"ratio": ratio, "stolen": took["stolen"], "measured_s": took["seconds"], "predicted": foretold}
            for ratio, (took, foretold) in zip(ratios["seconds"], pairs, strict=True)
        ],
    }  # fmt: skip


def summary(cases: CaseSet, figures: dict[str, Any]) -> dict[str, Any]:
    if not figures:
        return {"cases": 0}
    errors = [found["ratio"] - 1 for found in figures.values()]
    sizes = list(map(abs, errors))
    return {
        "cases": len(errors),
        "median_error": statistics.median(sizes),
        "worst_error": max(sizes),
        "slower_than_predicted": sum(error > 0 for error in errors),
        "faster_than_predicted": sum(error < 0 for error in errors),
        "target": {"median_error": cases.median, "worst_error": cases.worst},
        "within_target": statistics.median(sizes) <= cases.median and max(sizes) <= cases.worst,
    }


def write(cases: CaseSet, path: Path, rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Compute all figures from the rounds."""
    compared = {name: compare(cases, name, rounds) for name in cases.cases}
    figures = {name: found for name, found in compared.items() if found}
    document = {
        "model": cases.description,
        "ratio": "measured over predicted seconds, median over the rounds",
        "summary": summary(cases, figures),
        "figures": figures,
        "rounds": rounds,
    }
    save(cases.results, document, path)
    return document


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--offload-dir", required=True)
    add("--held-out", action="store_true", help="run the cases that the cost model was not developed with")
    add("--rounds", type=int, default=5)
    add("--case", action="append", help="run only cases whose names begin with this (may be repeated)")
    add("--device", choices=("cpu", "emulated"), default="", help="run only the cases of this device")
    add(
        "--resume",
        action="store_true",
        help="continue the interrupted round of the results, add further rounds, and predict all of them again",
    )
    add(
        "--reuse",
        action="store_true",
        help="with --resume, start with the last measurement in the results instead of a new one",
    )
    add("--out", help="write the results to this file")
    args = parser.parse_args()
    cases = HELD_OUT if args.held_out else DEVELOPED
    path = Path(args.out) if args.out else RESULTS / f"{cases.results}.json"
    rounds: list[dict[str, Any]] = load_results(path).get("rounds", []) if args.resume else []
    names = [
        name
        for name, case in cases.cases.items()
        if case.device.startswith(args.device) and name.startswith(tuple(args.case or ("",)))
    ]
    for device, some in itertools.groupby(names, lambda name: cases.cases[name].device):
        wanted, known = list(some), last_measured(rounds, device) if args.reuse else None
        for _ in range(args.rounds):
            if (one := unfinished(rounds, device)) is None:
                before = known or measured(device, args.offload_dir, again=True)
                one = {"device": device, "hardware": [before.to_dict()], "runs": {}}
                rounds.append(one)
            finish(one, cases, wanted, args.offload_dir, lambda: write(cases, path, rounds))
            known = last_measured(rounds, device)
    document = write(cases, path, rounds)
    for name, found in document["figures"].items():
        ratios = " ".join(f"{each['ratio']:.2f}" for each in found["by_round"])
        print(
            f"{name:<44}{found['ratio']:>6.2f}  prefill {found['prefill_ratio']:.2f}  decode "
            f"{found['decode_ratio']:.2f}  ({ratios})"
        )
    for name in names:
        if name not in document["figures"]:
            print(f"{name:<44} has no valid round: the machine changed, or other programs ran")
    if not (found := document["summary"])["cases"]:
        return
    print(
        f"{found['cases']} policies: median error {found['median_error']:.1%}, worst {found['worst_error']:.1%}; "
        f"{found['slower_than_predicted']} slower than predicted, {found['faster_than_predicted']} faster"
    )
    print(path)


if __name__ == "__main__":
    main()
