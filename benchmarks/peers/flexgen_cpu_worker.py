"""flexgen in a process of its own, for cpu_peers.py, which describes the job.

With a memory limit, the policy is "auto"; otherwise everything is in memory.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import torch
from protocol import job, prompt_ids, serve

from flexgen import OptLM, Policy, Workload
from flexgen.memory.cpu import peak_resident_bytes, resident_bytes

DTYPES = {"fp16": "float16"}
CODECS = ("int4", "int8", "int4_a8", "int8_a8")


def main() -> None:
    work = job()
    torch.set_num_threads(work["threads"])
    form, batch = work["format"], work["batch"]
    workload = Workload(work["prompt_len"], work["new"], batch)
    policy = "auto" if work["limit"] else in_memory(form, batch)
    baseline = resident_bytes()
    ids = prompt_ids(batch, work["prompt_len"])
    with (
        tempfile.TemporaryDirectory(dir=work["folder"]) as folder,
        OptLM(
            work["model"], policy, workload=workload, device="cpu", dtype=DTYPES.get(form, "bfloat16"),
            offload_dir=folder, progress=False,
        ) as model,
    ):  # fmt: skip

        def run(new: int) -> dict[str, Any]:
            began = time.perf_counter()
            out = model.generate(ids, new, stop=())
            took = time.perf_counter() - began
            assert model.stats is not None
            decode = model.stats.timing.decode
            return {
                "prefill_s": took - decode,  # with the set-up of the call
                "step_s": decode / max(new - 1, 1),
                "tokens": out[:, ids.shape[1] :].tolist(),
            }

        if work["limit"]:
            model.generate(ids[:1, :4], 2, stop=())  # starts threads, and runs the set-up of libraries
        else:
            run(2)
        opened = {
            "version": f"torch {torch.__version__}",
            "weight_bytes": sum(model.placement.nbytes.values()),
            "policy": model.policy.to_dict(),
            "baseline_bytes": baseline,
            "peak_bytes": peak_resident_bytes(),
        }
        serve(opened, lambda: run(work["new"]))


def in_memory(form: str, batch: int) -> Policy:
    codec = form if form in CODECS else "none"
    return Policy(
        gpu_batch_size=batch,
        weights={"cpu": {"percent": 100, "codec": codec}},
        cache={"cpu": 100},
        activations={"cpu": 100},
    )


if __name__ == "__main__":
    main()
