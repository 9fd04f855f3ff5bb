"""flexgen in a process of its own, for job_peers.py, which describes the job."""

from __future__ import annotations

import json
import tempfile
import time
from typing import Any

import numpy as np
import torch
from job_profile import Profile
from protocol import job, ragged_prompts, serve

from flexgen import OptLM, Policy, Workload

IN_MEMORY = {"weights": {"cpu": 100}, "cache": {"cpu": 100}, "activations": {"gpu": 100}}


def main() -> None:
    work = job()
    torch.set_num_threads(work["threads"])
    prompts, counts = ragged_prompts(work)
    workload = Workload(
        max(map(len, prompts)), max(counts), len(prompts), work["prefix"], mean_new=float(np.mean(counts))
    )
    policy = work["policy"]
    if policy != "auto":
        policy = Policy.from_dict(IN_MEMORY | json.loads(policy))
    with (
        tempfile.TemporaryDirectory(dir=work["folder"]) as folder,
        OptLM(
            work["model"], policy, workload=workload, device="cpu", dtype="bfloat16", offload_dir=folder,
            progress=False,
        ) as model,
    ):  # fmt: skip

        def run() -> dict[str, Any]:
            began = time.perf_counter()
            out, report = model.generate(prompts, counts, stop=(), stats=True)
            seconds, width = time.perf_counter() - began, max(map(len, prompts))
            assert report.prefix == work["prefix"], report.prefix
            return {
                "seconds": seconds,
                "reused_tokens": report.reused_tokens,
                "stages": {stage: used._asdict() for stage, used in report.stages.items()},
                "prefill_s": report.prefill_s,
                "padded_share": report.padded_share,
                "tokens": [row[width : width + n].tolist() for row, n in zip(out, counts, strict=True)],
            }

        model.generate(prompts[:4], 2, stop=())  # starts threads, and runs the set-up of libraries
        opened = {"version": f"torch {torch.__version__}", "policy": model.policy.to_dict()}
        profile = Profile() if work["profile"] else None
        serve(opened, run if profile is None else lambda: profile.of(run))


if __name__ == "__main__":
    main()
