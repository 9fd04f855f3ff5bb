"""llama.cpp's first token in a process of its own, for first_token.py, which describes the job.

With "write" in the job, it only writes the GGUF file, unless there is one.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path

started = time.perf_counter()

import llama_cpp as llama  # noqa: E402
from llama_cpp_worker import Engine, silent  # noqa: E402
from protocol import prompt_ids  # noqa: E402

imported = time.perf_counter()


def main() -> None:
    work = json.loads(sys.argv[1])
    path = Path(work["model"]) / f"{work['format']}.gguf"
    if "write" in work:
        if not path.exists():
            from gguf_file import write_gguf

            write_gguf(Path(work["model"]), path, work["format"])
        return
    llama.llama_log_set(silent, ctypes.c_void_p())
    model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    if not model:
        raise SystemExit(f"{path}: llama.cpp cannot load it")
    engine = Engine(model, 1, work["prompt_len"] + 1, work)
    opened = time.perf_counter()
    token = engine.run(prompt_ids(1, work["prompt_len"]), 1)["tokens"][0][0]
    ended = time.perf_counter()
    found = {
        "python_s": started - work["began"],
        "import_s": imported - started,
        "opening_s": opened - imported,
        "prefill_s": ended - opened,
        "token": token,
        "ended": ended,
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
