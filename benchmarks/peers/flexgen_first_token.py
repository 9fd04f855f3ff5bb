"""flexgen's first token in a process of its own, for first_token.py, which describes the job."""

from __future__ import annotations

import json
import sys
import time

started = time.perf_counter()

import torch  # noqa: E402

torch_imported = time.perf_counter()

from flexgen import OptLM, Policy  # noqa: E402, I001 (as users do: before the modules that it imports)

from contextlib import ExitStack  # noqa: E402
from typing import Any  # noqa: E402

from protocol import prompt_ids  # noqa: E402

import flexgen.engine.model  # noqa: E402
from flexgen.memory.cpu import peak_resident_bytes, resident_bytes  # noqa: E402
from flexgen.memory.homes import Homes  # noqa: E402

imported = time.perf_counter()
CODECS = ("int4", "int8")


def main() -> None:
    work = json.loads(sys.argv[1])
    torch.set_num_threads(work["threads"])
    resident = resident_bytes()
    seconds: dict[str, float] = {}
    noted(flexgen.engine.model, "open_model", "config_s", seconds)
    noted(Homes, "load", "weights_s", seconds)
    codec = work["format"] if work["format"] in CODECS else "none"
    policy = Policy(
        gpu_batch_size=1,
        weights={"cpu": {"percent": 100, "codec": codec}},
        cache={"cpu": 100},
        activations={"cpu": 100},
    )
    with ExitStack() as stack:
        model = OptLM(
            work["model"],
            policy,
            device="cpu",
            dtype="bfloat16",
            offload_dir=work["offload_dir"],
            fast_start=work["fast_start"],
            progress=False,
        )
        stack.enter_context(model)
        opened = time.perf_counter()
        ids = model.generate(prompt_ids(1, work["prompt_len"]), 1, stop=())
        ended = time.perf_counter()
        found = {
            "python_s": started - work["began"],
            "torch_s": torch_imported - started,
            "flexgen_s": imported - torch_imported,
            **seconds,
            "other_opening_s": opened - imported - sum(seconds.values()),
            "prefill_s": ended - opened,
            "resident_bytes": resident,
            "peak_bytes": peak_resident_bytes(),
            "token": int(ids[0, -1]),
            "ended": ended,
        }
        print(json.dumps(found), flush=True)


def noted(owner: Any, name: str, figure: str, seconds: dict[str, float]) -> None:
    """Replace the function `name` of `owner` by one that also records its seconds."""
    function = getattr(owner, name)

    def timed(*args: Any, **options: Any) -> Any:
        began = time.perf_counter()
        result = function(*args, **options)
        seconds[figure] = time.perf_counter() - began
        return result

    setattr(owner, name, timed)


if __name__ == "__main__":
    main()
