"""vLLM in a process of its own, for cpu_peers.py, which describes the job.

It needs vLLM's build for CPUs.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from protocol import job, prompt_ids, serve

DTYPES = {"bf16": "bfloat16", "fp16": "float16"}


def main() -> None:
    preload_openmp()
    work = job()
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in this process
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{work['threads'] - 1}",
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB
    }
    import vllm  # it reads the variables

    batch, prompt_len, new = work["batch"], work["prompt_len"], work["new"]
    engine = vllm.LLM(
        work["model"],
        dtype=DTYPES[work["format"]],
        skip_tokenizer_init=True,
        max_model_len=prompt_len + max(new, 2),
        max_num_seqs=batch,
        max_num_batched_tokens=max(batch * prompt_len, 256),  # all prompts in one step
        enable_prefix_caching=False,
    )
    ids = prompt_ids(batch, prompt_len)

    def run(new: int) -> dict[str, Any]:
        params = vllm.SamplingParams(temperature=0, max_tokens=new, min_tokens=new, detokenize=False)
        began = time.perf_counter()
        for n, row in enumerate(ids.tolist()):
            engine.llm_engine.add_request(f"{began}-{n}", {"prompt_token_ids": row}, params)
        ends, tokens = [], [[] for _ in range(batch)]
        while engine.llm_engine.has_unfinished_requests():
            for out in engine.llm_engine.step():
                tokens[int(out.request_id.split("-")[1])] = list(out.outputs[0].token_ids)
            ends.append(time.perf_counter())
        assert len(ends) == new, f"{len(ends)} steps for {new} tokens: the prefill was split"
        return {
            "prefill_s": ends[0] - began,
            "step_s": (ends[-1] - ends[0]) / max(new - 1, 1),
            "tokens": tokens,
        }

    run(2)
    nbytes = os.path.getsize(os.path.join(work["model"], "model.safetensors"))
    serve({"version": f"vllm {vllm.__version__}", "weight_bytes": nbytes}, lambda: run(work["new"]))


def preload_openmp() -> None:
    """Start this process again with Intel's OpenMP preloaded, as vLLM recommends, if the environment has it."""
    library = os.path.join(sys.prefix, "lib", "libiomp5.so")
    if os.path.exists(library) and "LD_PRELOAD" not in os.environ:
        os.environ["LD_PRELOAD"] = library
        os.execv(sys.executable, [sys.executable, *sys.argv])


if __name__ == "__main__":
    main()
