"""Jobs of many prompts on the preset machines, simulated: with the prefix computed once, and with rows that enter.

    python benchmarks/simulated_jobs.py [--job few-shot] [--resume]

For each job and machine, it searches for a policy twice: for whole prompts in blocks that run one after another
(`share_prefix = false`, and a call for each block), and for the job with its shared prefix, in which prompts enter
when rows end. `gain` is the ratio of the two times. Rows with `codecs` may use them in both. Nothing is
measured, so the figures are the same on any machine.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any, NamedTuple

from record import RESULTS, load_results, write_whole
from tqdm import tqdm

from flexgen.errors import CapacityError
from flexgen.models import open_model
from flexgen.policy import Auto
from flexgen.predict.hardware import Hardware
from flexgen.predict.job import Job
from flexgen.search.effort import THOROUGH
from flexgen.search.find import find_for_job
from flexgen.workload import Workload


class Case(NamedTuple):
    """fixed: the given fields of the policy. published: FlexGen's tokens/s, from its paper."""

    job: str
    model: str
    machine: str
    workload: Workload
    lossy: bool = False
    fixed: dict[str, Any] = {}
    published: float | None = None


PAPER = Workload(512, 32, 1024)
"""The lengths of FlexGen's paper."""
FEW_SHOT = Workload(1050, 20, 10_000, prefix=1000)
ANSWERS = Workload(512, 64, 1024, mean_new=13)
"""Answers of different lengths, geometrically distributed."""
INT4 = {"weights": {"cpu": {"percent": 100, "codec": "int4"}}}
ON_ALL = "t4", "l4", "rtx-3090", "rtx-4090", "a100-80g", "h100", "h200", "laptop-16g"
CASES = [
    Case("paper", "opt-30b", "t4", PAPER, published=7.32),
    Case("paper", "opt-30b", "t4-paper", PAPER, published=7.32),
    Case("paper", "llama-3.1-70b", "rtx-4090", PAPER, lossy=True),
    Case("answers", "llama-3.1-70b", "rtx-4090", ANSWERS, lossy=True),
    Case("answers", "opt-30b", "t4", ANSWERS),
    *(Case("few-shot", "llama-3.1-8b", machine, FEW_SHOT) for machine in ON_ALL),
    Case("few-shot", "opt-30b", "t4", FEW_SHOT),
    Case("few-shot", "opt-30b", "rtx-4090", FEW_SHOT),
    Case("few-shot", "llama-3.1-70b", "rtx-4090", FEW_SHOT, lossy=True),
    Case("few-shot", "llama-3.1-70b", "h200", FEW_SHOT),
]


def simulated(case: Case, workload: Workload) -> dict[str, Any]:
    """The best policy of a search, and its speed; or why none fits."""
    spec, _ = open_model(case.model, "dummy")
    try:
        job = Job.checked(spec, Hardware.preset(case.machine), workload)
        best = find_for_job(job, Auto(case.fixed, case.lossy), top=1, effort=THOROUGH).best
    except CapacityError as error:
        return {"refused": str(error)}
    report = best.prediction.report
    return {
        "tokens_s": float(f"{best.tokens_s:.4g}"),
        "seconds": float(f"{report.total_s:.4g}"),
        "bound_by": str(report.bottleneck),
        "dtype": report.dtype,
        "order": best.order,
        "placement": best.placement(),
        "shape": [best.policy.num_gpu_batches, best.policy.gpu_batch_size],
        "policy": best.policy.to_dict(),
    }


def row_of(case: Case) -> dict[str, Any]:
    workload = case.workload
    # Answers that differ take blocks as long as their longest, so they are a workload of blocks of `gen_len` tokens
    # with fewer new tokens.
    whole = replace(workload, prefix=0, mean_new=None)
    in_blocks = case._replace(fixed={**case.fixed, "prefill_rows": 0})
    before, now = simulated(in_blocks, whole), simulated(case, workload)
    row: dict[str, Any] = {"before": before, "now": now}
    if "seconds" in before and "seconds" in now:
        row["gain"] = float(f"{before['seconds'] / now['seconds']:.3g}")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description="Simulate jobs of many prompts on the preset machines.")
    jobs = list(dict.fromkeys(case.job for case in CASES))
    parser.add_argument("--job", choices=jobs, action="append", help="only this job (may be repeated)")
    parser.add_argument("--resume", action="store_true", help="keep the cases that are in the results")
    args = parser.parse_args()
    path = RESULTS / "simulated_jobs.json"
    known = load_results(path).get("rows", [])
    rows: list[dict[str, Any]] = []
    for case in tqdm(CASES, unit="case"):
        sizes = {name: getattr(case.workload, name) for name in ("prompt_len", "gen_len", "num_prompts")}
        more = {"prefix": case.workload.prefix, "mean_new": case.workload.mean_new}
        row = {"job": case.job, "model": case.model, "machine": case.machine, "codecs": case.lossy}
        row |= {"workload": sizes | more, "published": case.published}
        done = [one for one in known if row.items() <= one.items()]
        if done and (args.resume or args.job and case.job not in args.job):
            rows += done
        elif args.job and case.job not in args.job:
            continue
        else:
            rows.append(row | row_of(case))
            print(case.job, case.model, case.machine, rows[-1].get("gain"), rows[-1]["now"], flush=True)
        # Machine and versions are not recorded, because the figures do not depend on them.
        document = {"command": "python benchmarks/simulated_jobs.py", "rows": rows}
        write_whole(path, json.dumps(document, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
