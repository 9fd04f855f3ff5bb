"""llama.cpp in a process of its own, for job_peers.py, which describes the job.

It needs llama-cpp-python and gguf, and calls llama.cpp's C interface. The prefix is computed once; each sequence then
refers to its cells of a cache that all sequences share. A call of `llama_decode` has the next token of each running
sequence, and whole prompts for the sequences that have ended.
"""

from __future__ import annotations

import ctypes
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llama_cpp as llama
import numpy as np
from gguf_file import write_gguf
from llama_cpp_worker import silent
from protocol import job, ragged_prompts, serve


def main() -> None:
    work = job()
    path = Path(work["model"]) / "bf16.gguf"
    if not path.exists():
        write_gguf(Path(work["model"]), path, "bf16")
    prompts, counts = ragged_prompts(work)
    llama.llama_log_set(silent, ctypes.c_void_p())
    model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    if not model:
        raise SystemExit(f"{path}: llama.cpp cannot load it")
    engine = Engine(model, work, max(map(len, prompts)) + max(counts))
    engine.run(prompts[:4], [2] * 4)
    opened = {
        "version": f"llama-cpp-python {llama.__version__}",
        "built_with": llama.llama_print_system_info().decode(),
        "rows": work["llama_rows"],
        "batch": work["llama_tokens"],
        "ubatch": work["llama_ubatch"],
        "flash_attention": True,
        "kv_unified": work["llama_unified"],
    }
    serve(opened, lambda: engine.run(prompts, counts))


@dataclass
class Row:
    """A prompt that runs: its number, the position of its next token, and its new ids."""

    prompt: int
    position: int
    new: list[int] = field(default_factory=list)


class Engine:
    """A context for up to `llama_rows` sequences of up to `length` tokens. Sequence 0 has the prefix."""

    def __init__(self, model: Any, work: dict[str, Any], length: int) -> None:
        self._vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        self._rows, self._most, self._prefix = work["llama_rows"], work["llama_tokens"], work["prefix"]
        unified = work["llama_unified"]
        params = llama.llama_context_default_params()
        params.n_seq_max = self._rows + 1
        cells = self._prefix + self._rows * (length - self._prefix) if unified else 0
        each = -(-length // 256) * 256
        params.n_ctx = -(-cells // 256) * 256 if unified else each * params.n_seq_max
        params.n_batch = self._most
        params.n_ubatch = work["llama_ubatch"]
        params.n_threads = params.n_threads_batch = work["threads"]
        params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.kv_unified = unified
        params.no_perf = True
        self._context = llama.llama_init_from_model(model, params)
        if not self._context:
            raise SystemExit("llama.cpp cannot create a context")
        self._batch = llama.llama_batch_init(params.n_batch, 0, 1)

    def run(self, prompts: Sequence[np.ndarray], counts: Sequence[int]) -> dict[str, Any]:
        """The seconds of the job, and the new ids of each prompt (greedy)."""
        memory = llama.llama_get_memory(self._context)
        llama.llama_memory_clear(memory, True)
        began = time.perf_counter()
        self._begin()
        for position in range(self._prefix):
            self._add(prompts[0][position], position, 0, False)
        self._decode()
        waiting, free = deque(range(len(prompts))), list(range(self._rows, 0, -1))
        running: dict[int, Row] = {}  # by sequence
        tokens: list[list[int]] = [[] for _ in prompts]
        while waiting or running:
            self._begin()
            asked = []  # the sequences in the order of their logits
            for sequence, row in running.items():
                self._add(row.new[-1], row.position, sequence, True)
                row.position += 1
                asked.append(sequence)
            while waiting and free and self._fits(len(prompts[waiting[0]]) - self._prefix):
                number, sequence = waiting.popleft(), free.pop()
                llama.llama_memory_seq_cp(memory, 0, sequence, -1, -1)
                ids = prompts[number]
                for position in range(self._prefix, len(ids)):
                    self._add(ids[position], position, sequence, position == len(ids) - 1)
                running[sequence] = Row(number, len(ids))
                asked.append(sequence)
            for sequence, token in zip(asked, self._decode(), strict=True):
                row = running[sequence]
                row.new.append(int(token))
                if len(row.new) == counts[row.prompt]:
                    tokens[row.prompt] = row.new
                    llama.llama_memory_seq_rm(memory, sequence, -1, -1)
                    del running[sequence]
                    free.append(sequence)
        return {
            "seconds": time.perf_counter() - began,
            "reused_tokens": (len(prompts) - 1) * self._prefix,
            "tokens": tokens,
        }

    def _begin(self) -> None:
        self._batch.n_tokens, self._outputs = 0, 0

    def _fits(self, tokens: int) -> bool:
        return self._batch.n_tokens + tokens <= self._most

    def _add(self, token: int, position: int, sequence: int, output: bool) -> None:
        batch, at = self._batch, self._batch.n_tokens
        batch.token[at], batch.pos[at] = int(token), position
        batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
        batch.logits[at] = output
        batch.n_tokens = at + 1
        self._outputs += output

    def _decode(self) -> np.ndarray:
        """The next id after each token with an output, in the order of the batch."""
        if status := llama.llama_decode(self._context, self._batch):
            raise SystemExit(f"llama_decode: status {status}")
        if not self._outputs:
            return np.empty(0, np.int64)
        logits = ctypes.cast(llama.llama_get_logits(self._context), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(logits, shape=(self._outputs, self._vocab)).argmax(axis=1)


if __name__ == "__main__":
    main()
