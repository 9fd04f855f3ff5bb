"""The processes of the engines that benchmarks compare: each runs a script of `peers/` in its own environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cgroup import MemoryGroup

PEERS = Path(__file__).resolve().parent / "peers"
EXTENSIONS = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
)


class Worker:
    """A process of one engine, see `peers/protocol.py`. `opened`: what it reported when it was ready."""

    def __init__(
        self, python: str, script: str, job: Mapping[str, Any], group: MemoryGroup | None = None
    ) -> None:
        """python: the interpreter. script: the worker in `peers/`. job: its argument, with the number of `threads`.
        group: the control group of the process."""
        env = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        env["OMP_NUM_THREADS"] = str(job["threads"])
        if python != sys.executable:  # the peer's Python has its own packages
            env.pop("PYTHONPATH", None)
        words = [python, str(PEERS / script), json.dumps(job)]
        self._process = subprocess.Popen(
            group.command(words) if group else words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        self.opened = self._answer()

    def run(self) -> dict[str, Any]:
        """The result of one run of the job."""
        assert self._process.stdin is not None
        print(file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not (text := self._process.stdout.readline()):
            sys.exit(f"{self._process.args}: ended with status {self._process.wait()}")
        found: dict[str, Any] = json.loads(text)
        return found

    def end(self) -> None:
        self._process.communicate("")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def instruction_sets() -> list[str]:
    """The vector extensions of this processor (Linux, x86)."""
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    return [name for name in EXTENSIONS if name in flags]
