"""vLLM in a process of its own, for job_peers.py, which describes the job.

It needs vLLM's build for CPUs. Prefix caching is on; each run begins with an empty cache.
"""

from __future__ import annotations

import os
import time
from typing import Any

from protocol import job, ragged_prompts, serve
from vllm_worker import preload_openmp


def main() -> None:
    preload_openmp()
    work = job()
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in this process
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{work['threads'] - 1}",
        "VLLM_CPU_KVCACHE_SPACE": "4",  # GiB, enough for all prompts at the same time
    }
    import vllm  # it reads the variables

    prompts, counts = ragged_prompts(work)
    engine = vllm.LLM(
        work["model"],
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=max(map(len, prompts)) + max(counts),
        max_num_seqs=work["vllm_rows"],
        max_num_batched_tokens=work["vllm_tokens"],
        enable_prefix_caching=True,
    )

    def run(rows: int) -> dict[str, Any]:
        asked = [{"prompt_token_ids": prompt.tolist()} for prompt in prompts[:rows]]
        params = [
            vllm.SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False)
            for n in counts[:rows]
        ]
        assert engine.reset_prefix_cache()
        began = time.perf_counter()
        done = engine.generate(asked, params, use_tqdm=False)
        return {
            "seconds": time.perf_counter() - began,
            "reused_tokens": sum(out.num_cached_tokens or 0 for out in done),
            "tokens": [list(out.outputs[0].token_ids) for out in done],
        }

    run(4)
    opened = {
        "version": f"vllm {vllm.__version__}",
        "max_num_seqs": work["vllm_rows"],
        "max_num_batched_tokens": work["vllm_tokens"],
        "block_size": engine.llm_engine.vllm_config.cache_config.block_size,
    }
    serve(opened, lambda: run(len(prompts)))


if __name__ == "__main__":
    main()
