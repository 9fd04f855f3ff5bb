"""One measurement of accelerate, in its own process and Python: prints a JSON line.

    python accelerate_worker.py '{"model": DIR, "batch": 4, ...}'

accelerate_offload.py starts it. It needs torch, transformers and accelerate, but not flexgen. The job:

model       folder with config.json and model.safetensors
folder      folder of the variant that stores weights as numpy files
variant     safetensors: weights are read in place from model.safetensors, all on "disk"
            folder: `disk_offload`'s own files in `folder`, all on "disk"
            split: like safetensors, but with blocks in memory, as long as `_MARGIN` of `limit` stays free
batch, prompt_len, gen_len, context, steps
            prefill of prompt_len, then `steps` steps after `context` tokens (0: all gen_len - 1 steps)
"""

from __future__ import annotations

import importlib.metadata
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import disk_offload, dispatch_model, init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

_MARGIN = 0.06


def main() -> None:
    job = json.loads(sys.argv[1])
    began = time.perf_counter()
    baseline = _resident()
    model, in_memory = open_model(job)
    # The last positions of a batch are strided, and torch's product would then copy the head once per row.
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    opened = time.perf_counter()
    random = np.random.default_rng(0)
    ids = torch.from_numpy(random.integers(4, 30_000, size=(job["batch"], job["context"])))
    with torch.inference_mode():
        run(model, ids[:1, :4], 0)  # creates threads, and runs the one-time setup of libraries
        print("opened and warm", file=sys.stderr, flush=True)
        prefill, times, tokens = run(model, ids[:, : job["prompt_len"]], _steps_behind_prompt(job))
        print(f"prefill {prefill:.2f} s, steps {times}", file=sys.stderr, flush=True)
        if not times and job["gen_len"] > 1:
            _, times, _ = run(model, ids, job["steps"])
    found = {
        "prefill_s": prefill,
        "steps_s": times,
        "tokens": tokens,
        "open_s": opened - began,
        "baseline_bytes": baseline,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "settings": {"variant": job["variant"], "blocks_in_memory": in_memory},
        "versions": {
            name: importlib.metadata.version(name) for name in ("accelerate", "transformers", "torch")
        },
    }
    print(json.dumps(found))


def _steps_behind_prompt(job: dict[str, Any]) -> int:
    if not job["steps"]:
        return int(job["gen_len"]) - 1
    return int(job["steps"]) if job["context"] == job["prompt_len"] else 0


def run(model: Any, ids: torch.Tensor, steps: int) -> tuple[float, list[float], list[int]]:
    """The seconds of the prefill and of each step, and the new ids of the first row (greedy)."""
    times, tokens, past = [], [], None
    for _ in range(1 + steps):
        began = time.perf_counter()
        # Logits of one position, as in `generate`: those of a whole prompt would take more memory than its cache.
        out = model(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)
        past, ids = out.past_key_values, out.logits[:, -1].argmax(dim=-1, keepdim=True)
        times.append(time.perf_counter() - began)
        tokens.append(int(ids[0, 0]))
    return times[0], times[1:], tokens


def open_model(job: dict[str, Any]) -> tuple[Any, int]:
    """The model with its hooks, and the number of its blocks in memory."""
    folder = Path(job["model"])
    weights = folder / "model.safetensors"
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder), dtype=torch.bfloat16
        ).eval()
    model.tie_weights()
    if job["variant"] == "folder":
        return _in_folder(model, weights, Path(job["folder"])), 0
    blocks = [name for name, module in model.named_modules() if _is_block(name, module)]
    on_cpu = blocks[: _fitting(model, blocks, job)] if job["variant"] == "split" else []
    index = {}
    with safe_open(weights, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (it is no mapping)
            index[name] = {"safetensors_file": str(weights), "weight_name": name, "dtype": "bfloat16"}
            if any(name.startswith(f"{block}.") for block in on_cpu):
                set_module_tensor_to_device(model, name, "cpu", value=file.get_tensor(name).clone())
    for name in model.state_dict():  # a tied head has no separate tensor in the file
        index.setdefault(name, index[_embedding(index)])
    device_map = dict.fromkeys(_outside(model, blocks), "disk")
    device_map |= {block: "cpu" if block in on_cpu else "disk" for block in blocks}
    if not on_cpu:
        device_map = {"": "disk"}
    return dispatch_model(model, device_map, main_device="cpu", offload_index=index), len(on_cpu)


def _in_folder(model: Any, weights: Path, folder: Path) -> Any:
    """Call `disk_offload`, which creates its files from the checkpoint the first time."""
    if not (folder / "index.json").exists():
        with safe_open(weights, framework="pt") as file:
            names = set(file.keys())
            for name, parameter in model.state_dict().items():
                source = name if name in names else _embedding(names)
                if parameter.device.type == "meta":
                    set_module_tensor_to_device(model, name, "cpu", value=file.get_tensor(source))
    return disk_offload(model, str(folder), execution_device=torch.device("cpu"))


def _is_block(name: str, module: Any) -> bool:
    return name.rpartition(".")[2].isdigit() and type(module).__name__.endswith("DecoderLayer")


def _fitting(model: Any, blocks: list[str], job: dict[str, Any]) -> int:
    """The number of blocks that fit in memory together with the process and the cache of this job."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    tokens = job["prompt_len"] + job["gen_len"]
    # While a token is appended, a layer's keys and values are in memory twice.
    cache = 2 * 2 * job["batch"] * tokens * heads * head_dim * (config.num_hidden_layers + 1)
    embedding = model.get_input_embeddings().weight.numel() * 2  # read for each use, then dropped
    hidden = job["batch"] * job["context"] * config.hidden_size * 2 * 12
    block = sum(p.numel() for p in model.get_submodule(blocks[0]).parameters()) * 2
    free = (1 - _MARGIN) * job["limit"] - _resident() - cache - embedding - hidden - block
    return max(min(int(free // block), len(blocks)), 0)


def _outside(model: Any, blocks: list[str]) -> list[str]:
    """The modules with weights outside of the blocks."""
    owners = {name.rpartition(".")[0] for name in model.state_dict()}
    return sorted(owner for owner in owners if not any(owner.startswith(f"{block}.") for block in blocks))


def _embedding(names: Any) -> str:
    return next(name for name in names if name.endswith("embed_tokens.weight"))


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    main()
