"""llama.cpp in a process of its own, for cpu_peers.py, which describes the job.

It needs llama-cpp-python and gguf, and calls llama.cpp's C interface, without a sampler or a tokenizer between. The
GGUF file is written from the safetensors file the first time.
"""

from __future__ import annotations

import ctypes
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp as llama
import numpy as np
from gguf_file import write_gguf
from protocol import job, prompt_ids, serve


def main() -> None:
    work = job()
    form = work["format"].removesuffix("_a8")  # it always rounds activations to int8 with such weights
    path = Path(work["model"]) / f"{form}.gguf"
    if not path.exists():
        write_gguf(Path(work["model"]), path, form)
    batch, prompt_len, new = work["batch"], work["prompt_len"], work["new"]
    llama.llama_log_set(silent, ctypes.c_void_p())
    model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    if not model:
        raise SystemExit(f"{path}: llama.cpp cannot load it")
    engine = Engine(model, batch, prompt_len + max(new, 2), work)
    ids = prompt_ids(batch, prompt_len)
    engine.run(ids[:1, :4] if work["limit"] else ids, 2)
    opened = {
        "version": f"llama-cpp-python {llama.__version__}",
        "built_with": llama.llama_print_system_info().decode(),
        "weight_bytes": llama.llama_model_size(model),
        "ubatch": work["ubatch"],
    }
    serve(opened, lambda: engine.run(ids, new))


_ERROR = 4
"""GGML_LOG_LEVEL_ERROR"""


@llama.llama_log_callback
def silent(level: int, text: bytes, _: object) -> None:
    """Print only llama.cpp's errors."""
    if level == _ERROR:
        sys.stderr.write(text.decode())


class Engine:
    """A context for `rows` sequences of up to `length` tokens."""

    def __init__(self, model: Any, rows: int, length: int, work: dict[str, Any]) -> None:
        self._vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        params = llama.llama_context_default_params()
        params.n_ctx = rows * -(-length // 256) * 256
        params.n_seq_max = rows
        params.n_batch = rows * length
        params.n_ubatch = min(work["ubatch"], params.n_batch)
        params.n_threads = params.n_threads_batch = work["threads"]
        params.kv_unified = False  # a cache for each sequence: attention does not read those of the others
        params.no_perf = True
        self._context = llama.llama_init_from_model(model, params)
        if not self._context:
            raise SystemExit("llama.cpp cannot create a context")
        self._batch = llama.llama_batch_init(params.n_batch, 0, 1)

    def run(self, ids: np.ndarray, new: int) -> dict[str, Any]:
        """Seconds of the prefill and of a step, and the `new` ids of each row (greedy)."""
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
        began = time.perf_counter()
        tokens = [self._forward(ids, 0)]
        ends = [time.perf_counter()]
        for n in range(1, new):
            tokens.append(self._forward(tokens[-1][:, None], ids.shape[1] + n - 1))
            ends.append(time.perf_counter())
        return {
            "prefill_s": ends[0] - began,
            "step_s": (ends[-1] - ends[0]) / max(new - 1, 1),
            "tokens": np.stack(tokens, axis=1).tolist(),
        }

    def _forward(self, ids: np.ndarray, position: int) -> np.ndarray:
        """The next id of each row, after `ids` at the positions from `position` on."""
        batch, (rows, length) = self._batch, ids.shape
        batch.n_tokens = rows * length
        for row in range(rows):
            for n in range(length):
                at = row * length + n
                batch.token[at], batch.pos[at] = int(ids[row, n]), position + n
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, row
                batch.logits[at] = n == length - 1
        if status := llama.llama_decode(self._context, batch):
            raise SystemExit(f"llama_decode: status {status}")
        logits = llama.llama_get_logits(
            self._context
        )  # of the requested positions, in the order of the batch
        values = np.ctypeslib.as_array(
            ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), shape=(rows, self._vocab)
        )
        return values.argmax(axis=1)


if __name__ == "__main__":
    main()
