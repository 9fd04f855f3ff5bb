"""One measurement of flexgen, in its own process: prints a JSON line.

    python flexgen_worker.py '{"model": DIR, "batch": 16, "batches": 1, "codec": "none", ...}'

accelerate_offload.py starts it. It tries policies on a grid (weights and cache on CPU and disk, with and without
overlap), and chooses the one with the fewest transfers whose plan, together with the memory of the process before a
model is opened, leaves `MARGIN` of `limit` free. If the engine then finds less memory, it tries the next smaller one.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from flexgen import OptLM, Policy, Tier, Workload
from flexgen.errors import CapacityError
from flexgen.layout.needs import MemoryPlan
from flexgen.layout.placement import place_weights
from flexgen.layout.plan import Target, plan_memory
from flexgen.layout.topology import SHARED
from flexgen.memory.cpu import peak_resident_bytes, resident_bytes
from flexgen.models import build_layers, open_model
from flexgen.schedule.orders import ORDERS, order_for
from flexgen.schedule.steps import Op

MARGIN = 0.06
"""Peaks were up to 62 MB above plans of this size (`benchmarks/memory.py`), and 15 MB above that of llama-1b."""
ATTEMPTS, SMALLER = 4, 0.15
DTYPE = torch.bfloat16


def main() -> None:
    job = json.loads(sys.argv[1])
    baseline = resident_bytes()
    room = job.get("room", (1 - MARGIN) * job["limit"] - baseline)
    policy, planned = choose(job, room)
    text = f"baseline {baseline >> 20} MiB, plan {planned >> 20} MiB: {policy.to_dict()}"
    print(text, file=sys.stderr, flush=True)
    try:
        found = measure(job, policy)
    except CapacityError as error:
        refused = job.get("refused", 0) + 1
        if refused == ATTEMPTS:
            raise
        print(error, file=sys.stderr, flush=True)
        # Start again in a new process: memory that this attempt left behind would count against the next one.
        job |= {"room": (1 - SMALLER) * planned, "refused": refused}
        os.execv(sys.executable, [sys.executable, __file__, json.dumps(job)])
    settings = {"policy": policy.to_dict(), "refused_before": job.get("refused", 0)}
    print(json.dumps(found | {"baseline_bytes": baseline, "planned_bytes": planned, "settings": settings}))


def measure(job: dict[str, Any], policy: Policy) -> dict[str, Any]:
    """The seconds and bytes of opening the model and running the job with a policy."""
    ids = np.random.default_rng(0).integers(4, 30_000, size=(policy.block_size, job["context"]))
    began = time.perf_counter()
    with OptLM(
        job["model"], policy, device="cpu", dtype=DTYPE, offload_dir=job["folder"], progress=False
    ) as model:
        opened, open_peak = time.perf_counter() - began, peak_resident_bytes()
        model.generate(ids[:1, :4], 2, stop=())  # creates threads, and runs the one-time setup of libraries
        prefill, times, tokens = run(model, ids[:, : job["prompt_len"]], job, _steps_behind_prompt(job))
        print(f"prefill {prefill:.2f} s, steps {times}", file=sys.stderr, flush=True)
        if not times and job["gen_len"] > 1:
            _, times, _ = run(model, ids, job, job["steps"])
        assert model.stats is not None
        stats = model.stats
    return {
        "prefill_s": prefill,
        "steps_s": times,
        "tokens": tokens,
        "open_s": opened,
        "peak_rss_bytes": peak_resident_bytes(),
        "open_peak_rss_bytes": open_peak,
        "excess_bytes": stats.peak_bytes[Tier.CPU] - stats.plan.on(Tier.CPU),
        "busy_s": {str(lane): seconds for lane, seconds in stats.timing.trace.busy().items()},
        "versions": {"torch": torch.__version__},
    }


def run(
    model: OptLM, ids: np.ndarray, job: dict[str, Any], steps: int
) -> tuple[float, list[float], list[int]]:
    """The seconds of the prefill and of each step, and the new ids of the first row (greedy)."""
    left = job["prompt_len"] + job["gen_len"] - ids.shape[1]
    out = model.generate(ids, left, cut_gen_len=1 + steps, stop=())
    assert model.stats is not None
    timing, last = model.stats.timing, len(model.layer_names) - 1
    ends = [timing.prefill] + [0.0] * steps
    for event in timing.trace.events:
        if event.step.op is Op.STORE_HIDDEN and event.step.layer == last and event.step.token:
            ends[event.step.token] = max(ends[event.step.token], event.end)
    times = [after - before for before, after in zip(ends, ends[1:], strict=False)]
    return timing.prefill, times, out[0, ids.shape[1] : ids.shape[1] + 1 + steps].tolist()


def _steps_behind_prompt(job: dict[str, Any]) -> int:
    if not job["steps"]:
        return int(job["gen_len"]) - 1
    return int(job["steps"]) if job["context"] == job["prompt_len"] else 0


def choose(job: dict[str, Any], room: float) -> tuple[Policy, int]:
    """The policy that reads the fewest bytes from disk for each token, and its planned bytes in memory.

    Raises CapacityError if no policy fits in `room` bytes.
    """
    spec, _ = open_model(job["model"])
    prompt_len = max(job["prompt_len"], job["context"])
    new_tokens = job["prompt_len"] + job["gen_len"] - prompt_len
    workload = Workload(prompt_len, new_tokens, job["batch"] * job["batches"])
    least, best = float("inf"), None
    found: list[int] = []
    for policy in policies(job):
        plan = _plan(spec, policy, workload)
        found.append(plan.on(Tier.CPU))
        # Without overlap, the times of reads and computation add up, so try it only if nothing else fits.
        cost = plan.on(Tier.DISK) * (1 if policy.overlap else 100)
        if plan.on(Tier.CPU) <= room and cost < least:
            least, best = cost, (policy, plan.on(Tier.CPU))
    if best is None:
        raise CapacityError(f"the smallest policy needs {min(found)} bytes, but only {int(room)} are free")
    return best


def policies(job: dict[str, Any]) -> Iterator[Policy]:
    """Shares of the weights in steps of 2% and of the cache in steps of 25%; the rest is on disk."""
    for overlap in (True, False):
        for cache in (100, 75, 50, 25, 0):
            for weights in range(100, -2, -2):
                share = {"percent": weights, "codec": job["codec"]}
                rest = {"percent": 100 - weights, "codec": job["codec"]}
                yield Policy(
                    gpu_batch_size=job["batch"],
                    num_gpu_batches=job["batches"],
                    weights={"cpu": share, "disk": rest},
                    cache={"cpu": cache, "disk": 100 - cache},
                    activations={"cpu": 100},
                    overlap=overlap,
                )


def _plan(spec: Any, policy: Policy, workload: Workload) -> MemoryPlan:
    layers = build_layers(spec, sep_layer=policy.sep_layer)
    placement = place_weights(layers, policy.weights, DTYPE)
    slots = ORDERS[order_for(policy.overlap, policy.num_gpu_batches)].slots
    return plan_memory(layers, placement, policy, Target(SHARED, slots), workload)


if __name__ == "__main__":
    main()
