"""The time of searches and predictions for OPT-175B, the largest known model.

    python benchmarks/search_time.py

Runs `find_policy` for 768 prompts of 512 tokens with 32 new tokens, on three presets: the paper's T4, a laptop and an
H100. Then it predicts each policy token by token (`python -m flexgen.simulate`). Each runs in its own process, like a
command, with empty caches. The laptop's disk is too small, and the error must not take longer either. Targets: 20 s
for a search, 10 s for a prediction. Keep the machine idle.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from functools import partial
from typing import Any

from record import interleaved, save

from flexgen.errors import CapacityError
from flexgen.models import open_model
from flexgen.policy import Policy
from flexgen.predict.hardware import Hardware
from flexgen.predict.prediction import predict
from flexgen.search.find import find_policy
from flexgen.workload import Workload

MODEL = "opt-175b"
WORKLOAD = Workload(prompt_len=512, gen_len=32, num_prompts=768)
MACHINES = "t4", "laptop-16g", "h100"
SEARCH_S, PREDICT_S = 20.0, 10.0


def search(machine: str) -> dict[str, Any]:
    """The seconds of a search, and its result."""
    spec, _ = open_model(MODEL, "dummy")
    began = time.perf_counter()
    try:
        found = find_policy(spec, Hardware.preset(machine), WORKLOAD)
    except CapacityError as error:
        return {"seconds": time.perf_counter() - began, "refused": str(error)}
    return {
        "seconds": time.perf_counter() - began,
        "considered": found.considered,
        "tokens_s": found.best.tokens_s,
        "policy": found.best.policy.to_dict(),
        "order": found.best.order,
    }


def simulate(machine: str, policy: dict[str, Any], order: str) -> dict[str, Any]:
    """The seconds of a prediction that simulates every token of a block, like `flexgen.simulate`."""
    spec, _ = open_model(MODEL, "dummy")
    asked = Policy.from_dict(policy)
    block = Workload(WORKLOAD.prompt_len, WORKLOAD.gen_len, asked.block_size)
    began = time.perf_counter()
    predict(spec, asked, Hardware.preset(machine), block, order=order)
    return {"seconds": time.perf_counter() - began}


def alone(work: partial[dict[str, Any]], found: dict[str, Any]) -> dict[str, float]:
    """The seconds of `work` in a new process. Its other results are added to `found`."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        result = pool.apply(work)
    seconds = result.pop("seconds")
    found.update(result)
    return {"seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--case", choices=MACHINES, action="append", help="run only this machine (may be repeated)"
    )
    args = parser.parse_args()
    found: dict[str, dict[str, Any]] = {machine: {} for machine in args.case or MACHINES}
    searches = interleaved(
        {machine: partial(alone, partial(search, machine), result) for machine, result in found.items()},
        args.repeats,
    )
    simulations = interleaved(
        {
            machine: partial(alone, partial(simulate, machine, result["policy"], result["order"]), {})
            for machine, result in found.items()
            if "policy" in result
        },
        args.repeats,
    )
    for machine, result in found.items():
        line = f"{machine:<12} search {searches[machine]['seconds']['median']:6.2f} s of {SEARCH_S:g}"
        if machine in simulations:
            took = simulations[machine]["seconds"]["median"]
            line += f", simulation {took:6.2f} s of {PREDICT_S:g}, {result['tokens_s']:.4g} tokens/s"
        print(line + (f", {result['refused']}" if "refused" in result else ""))
    document = {
        "model": MODEL,
        "workload": [WORKLOAD.prompt_len, WORKLOAD.gen_len, WORKLOAD.num_prompts],
        "target": {"search_s": SEARCH_S, "simulation_s": PREDICT_S},
        "search": {machine: found[machine] | searches[machine] for machine in found},
        "simulation": simulations,
    }
    print(save("search_time", document))


if __name__ == "__main__":
    main()
