"""An upper bound of the gain of separate batch sizes for attention and experts, for the policies of mixtures.json.

    python benchmarks/mixtures.py
    python benchmarks/module_batches.py

A batch of flexgen passes through attention and experts with the same number of rows. For each policy, three runs are
simulated: the run itself; a run that multiplies all rows of a block at once, in products where that is faster; and
such a run whose weights also fill the device memory that the batches' workspace takes, as if attention of a few rows
needed none. The gain of the third run over the first one is the bound. Nothing is measured.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from mixtures import job_of
from record import RESULTS, write_whole
from tqdm import tqdm

from flexgen.layout.placement import place_weights
from flexgen.models import Layer, build_layers
from flexgen.models.layer import AttentionLayer
from flexgen.policy import Policy, Tier
from flexgen.predict.arithmetic import Arithmetic
from flexgen.predict.job import Job
from flexgen.predict.prediction import Prediction, predict_job
from flexgen.workload import Workload

_products, _projection = Arithmetic.products, Arithmetic.projection


def in_blocks(job: Job, policy: Policy) -> Prediction:
    """The prediction if products multiply all rows of a block where that is faster, and each batch takes its share.

    It may be slower: few rows are multiplied with an encoded matrix, and for many rows the matrix is decoded.
    """
    count = policy.num_gpu_batches

    def products(self: Arithmetic, layer: Layer, rows: int, new: int, first: bool) -> float:
        whole = _products(self, layer, rows * count, new, True) / count
        return min(whole, _products(self, layer, rows, new, first))

    def projection(self: Arithmetic, layer: AttentionLayer, rows: int, first: bool) -> float:
        whole = _projection(self, layer, rows * count, True) / count
        return min(whole, _projection(self, layer, rows, first))

    with patch.multiple(Arithmetic, products=products, projection=projection):
        return predict_job(job, policy)


def more_weights(job: Job, policy: Policy, nbytes: int) -> Policy:
    """The policy with up to `nbytes` more bytes of the weights on the device, from host memory and then from disk."""
    layers = build_layers(job.spec, policy.sep_layer)
    placement = place_weights(layers, policy.weights, job.dtype)
    percents = {tier: policy.weights.percent(tier) for tier in Tier}
    total = sum(percents[tier] > 0 and placement.nbytes[tier] for tier in Tier)
    points = round(100 * nbytes / total + 0.5)  # rounded up: this is an upper bound
    for tier in (Tier.DISK, Tier.CPU):
        moved = min(points, int(percents[tier]))
        points, percents[tier] = points - moved, percents[tier] - moved
        percents[Tier.GPU] += moved
    source = Tier.CPU if policy.weights.percent(Tier.CPU) else Tier.GPU
    codecs = {tier: policy.weights[source if tier is Tier.GPU else tier].codec for tier in Tier}
    shares = {
        str(tier): {"percent": count, "codec": codecs[tier]} for tier, count in percents.items() if count
    }
    return policy.replace(weights=shares)


def bound(model: str, machine: str, workload: list[int], found: dict[str, Any]) -> dict[str, Any]:
    """The speed of the policy, of blocks, and of blocks with more weights on the device, in new tokens/s."""
    job = replace(job_of(model, machine, Workload(*workload)), order=found["order"])
    policy = Policy.from_dict(found["policy"])
    now = predict_job(job, policy)
    workspace = now.plan.workspace(Tier.GPU)
    capacity = dict(job.hardware.capacity) | {Tier.GPU: 4 * job.hardware.capacity[Tier.GPU]}
    larger = replace(job, hardware=job.hardware.replace(capacity=capacity))
    speeds = {
        "tokens_s": now,
        "in_blocks": in_blocks(job, policy),
        "bound": in_blocks(larger, more_weights(job, policy, workspace)),
    }
    shown = {name: float(f"{one.report.throughput_tokens_s:.4g}") for name, one in speeds.items()}
    # More weights on the device are no gain if it decodes them there.
    shown["bound"] = max(shown.values())
    return shown | {"workspace_bytes": workspace, "gain": round(shown["bound"] / shown["tokens_s"] - 1, 3)}


def main() -> None:
    rows = []
    cases = json.loads((RESULTS / "mixtures.json").read_text(encoding="utf-8"))["rows"]
    for row in tqdm(cases, unit="case"):
        for form in ("lossless", "codecs"):
            own = bound(row["model"], row["machine"], row["workload"], row[form])
            given = {key: row[key] for key in ("model", "machine", "workload")}
            rows.append(given | {"form": form, "shape": row[form]["shape"]} | own)
            print(*rows[-1].values(), sep="  ", flush=True)
    path = RESULTS / "module_batches.json"
    document = {"command": "python benchmarks/module_batches.py", "rows": rows}
    write_whole(path, json.dumps(document, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
