"""transformers in a process of its own, for cpu_peers.py, which describes the job.

It needs torch and transformers, but not flexgen.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers
from protocol import job, prompt_ids, serve
from transformers import AutoModelForCausalLM

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> None:
    work = job()
    torch.set_num_threads(work["threads"])
    model = AutoModelForCausalLM.from_pretrained(work["model"], dtype=DTYPES[work["format"]]).eval()
    # The last positions of a batch are strided, and torch's product would then copy the head once per row.
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    ids = torch.from_numpy(prompt_ids(work["batch"], work["prompt_len"]))

    @torch.inference_mode()
    def run(new: int) -> dict[str, Any]:
        began = time.perf_counter()
        tokens, ends, past, fed = [], [], None, ids
        for _ in range(new):
            # Logits of one position, as in `generate`.
            out = model(input_ids=fed, past_key_values=past, use_cache=True, logits_to_keep=1)
            past, fed = out.past_key_values, out.logits[:, -1].argmax(dim=-1, keepdim=True)
            tokens.append(fed[:, 0].tolist())
            ends.append(time.perf_counter())
        return {
            "prefill_s": ends[0] - began,
            "step_s": (ends[-1] - ends[0]) / max(new - 1, 1),
            "tokens": [list(row) for row in zip(*tokens, strict=True)],
        }

    run(2)
    nbytes = sum(weight.nbytes for weight in model.parameters())
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    serve({"version": versions, "weight_bytes": nbytes}, lambda: run(work["new"]))


if __name__ == "__main__":
    main()
