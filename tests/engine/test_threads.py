"""The threads of a process that computes: its lanes and readers of the disk have no threads of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

TEAMS = {"cpu": 2, "emulated": 3}
"""torch's OpenMP threads and those of the compiled kernels. The emulated GPU and attention on the host are two that
compute with torch."""
SCRIPT = """
import json, os, sys, threading
import torch
from flexgen import OptLM, Policy

directory, folder, device, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
thirds = {"gpu": 34, "cpu": 33, "disk": 33}
policy = Policy(gpu_batch_size=8, num_gpu_batches=2, weights=thirds, cache=thirds, activations=thirds)
prompts = [[3 + (7 * row + n) % 90 for n in range(64)] for row in range(16)]
counts = []
with OptLM(directory, policy, weights="dummy", device=device, offload_dir=folder, progress=False) as lm:
    for _ in range(2):
        lm.generate(prompts, 4, stop=())
        counts.append(len(os.listdir("/proc/self/task")))
print(json.dumps([*counts, threading.active_count()]))
"""


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`counted(device, n)`: the system's threads after one and after two calls with n threads for arithmetic."""
    from transformers import OPTConfig

    directory = tmp_path_factory.mktemp("threads")
    sizes = dict(hidden_size=256, word_embed_proj_dim=256, ffn_dim=1024, vocab_size=512)
    OPTConfig(num_hidden_layers=3, num_attention_heads=4, **sizes).save_pretrained(directory)

    @cache
    def run(device: str, threads: int) -> list[int]:
        command = [sys.executable, "-c", SCRIPT, str(directory), str(directory), device, str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found: list[int] = json.loads(done.stdout.splitlines()[-1])
        return found

    return run


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
@pytest.mark.parametrize("device", TEAMS)
def test_no_lane_has_a_team_of_its_own(device: str, counted: Any) -> None:
    """The tensors are large enough for every operation of torch to use all threads."""
    alone, several = counted(device, 1), counted(device, 4)
    assert several[0] - alone[0] <= TEAMS[device] * 3
    assert several[0] > alone[0], "nothing was computed with more than one thread"
    # A second call uses the threads of the first.
    assert several[1] <= several[0]
    assert alone[1] <= alone[0]
