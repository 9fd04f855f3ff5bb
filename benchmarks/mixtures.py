"""Mixtures of experts on four machines: simulated throughput, its bound, and the published figures of other engines.

    python benchmarks/mixtures.py [--resume] [--thorough]

For each model, machine and job, it searches for a policy, without codecs and with them, and simulates the policy. The
search is a quick one. With --thorough, a row also has the result of a thorough search, which takes longer, if that
of the quick one is below 95% of its bound.
Nothing is measured, so the figures are the same on any machine. The published figures are those of MoE-Lightning with
padded prompts, and of FlexGen, in MoE-Lightning's paper (arXiv 2411.11217, tables 2 to 4).
"""

from __future__ import annotations

import argparse
import json
from typing import Any, NamedTuple

from record import RESULTS, write_whole
from tqdm import tqdm

from flexgen.errors import CapacityError
from flexgen.models import open_model
from flexgen.policy import Auto
from flexgen.predict.hardware import Hardware
from flexgen.predict.job import Job
from flexgen.search.effort import QUICK, THOROUGH, Effort
from flexgen.search.find import find_for_job
from flexgen.workload import Workload


class Case(NamedTuple):
    """published: new tokens/s of MoE-Lightning and of FlexGen, in float16."""

    model: str
    machine: str
    workload: Workload
    published: tuple[float, float] | None = None


SYNTHETIC, MTBENCH = (256, 50), (418, 128)
"""Prompt tokens, which are padded, and new tokens of each prompt."""
PUBLISHED = [
    Case("mixtral-8x7b", "t4", Workload(*SYNTHETIC, 936), (26.3, 22.7)),
    Case("mixtral-8x7b", "t4", Workload(*MTBENCH, 504), (30.1, 9.5)),
    Case("mixtral-8x7b", "l4", Workload(*SYNTHETIC, 1500), (105, 50)),
    Case("mixtral-8x7b", "l4", Workload(*MTBENCH, 504), (79, 37)),
]
OTHERS = [
    Case(model, machine, Workload(*MTBENCH, 504))
    for model in ("mixtral-8x7b", "qwen3-30b-a3b", "gpt-oss-120b")
    for machine in ("t4", "l4", "rtx-4090", "h200")
    if (model, machine) not in {case[:2] for case in PUBLISHED}
]


def job_of(model: str, machine: str, workload: Workload) -> Job:
    """The job of a row."""
    spec, _ = open_model(model, "dummy")
    return Job.checked(spec, Hardware.preset(machine), workload)


def simulated(case: Case, lossy: bool, effort: Effort = QUICK) -> dict[str, Any]:
    """The best policy of a search: its speed, the bound of that speed, and where its weights are."""
    job = job_of(case.model, case.machine, case.workload)
    try:
        best = find_for_job(job, Auto({}, lossy), top=1, effort=effort).best
    except CapacityError as error:
        return {"refused": str(error)}
    report = best.prediction.report
    assert report.bound_share is not None
    return {
        "tokens_s": float(f"{best.tokens_s:.4g}"),
        "bound_tokens_s": float(f"{best.tokens_s / report.bound_share:.4g}"),
        "bound_by": str(report.bottleneck),
        "dtype": report.dtype,
        "order": best.order,
        "placement": best.placement(),
        "shape": [best.policy.num_gpu_batches, best.policy.gpu_batch_size],
        "policy": best.policy.to_dict(),
    }


KINDS = {"lossless": False, "codecs": True}
"""The two searches of a row, and whether they may use codecs."""


def add_thorough(case: Case, row: dict[str, Any]) -> None:
    """Search the policies of a row again that are below 95% of their bound."""
    for kind, lossy in KINDS.items():
        found = row[kind]
        if f"thorough_{kind}" not in row and found.get("tokens_s", 1) < 0.95 * found.get("bound_tokens_s", 0):
            row[f"thorough_{kind}"] = simulated(case, lossy, THOROUGH)


def main() -> None:
    parser = argparse.ArgumentParser(description="Simulate mixtures of experts on four machines.")
    parser.add_argument("--thorough", action="store_true", help="search again if a row is below its bound")
    parser.add_argument("--resume", action="store_true", help="keep the cases that are in the results")
    args = parser.parse_args()
    path = RESULTS / "mixtures.json"
    known = [] if not path.exists() else json.loads(path.read_text(encoding="utf-8"))["rows"]
    rows: list[dict[str, Any]] = []
    for case in tqdm([*PUBLISHED, *OTHERS], unit="case"):
        row: dict[str, Any] = {
            "model": case.model,
            "machine": case.machine,
            "workload": [case.workload.prompt_len, case.workload.gen_len, case.workload.num_prompts],
        }
        if case.published:
            row |= dict(zip(("moe_lightning", "flexgen_0_1"), case.published, strict=True))
        done = [one for one in known if args.resume and row.items() <= one.items()]
        rows += done or [row | {kind: simulated(case, lossy) for kind, lossy in KINDS.items()}]
        if args.thorough:
            add_thorough(case, rows[-1])
        # Machine and versions are not recorded, because the figures do not depend on them.
        document = {"command": "python benchmarks/mixtures.py --thorough", "rows": rows}
        write_whole(path, json.dumps(document, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
