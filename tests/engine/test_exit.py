"""The interpreter exits when it is asked to, whatever a model is doing; each test is a separate process."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import sys
from flexgen import OptLM, Policy
from flexgen.models.embed import InputEmbed

parts = {"gpu": 34, "cpu": 33, "disk": 33}
policy = Policy(gpu_batch_size=2, num_gpu_batches=2, weights=parts, cache=parts, activations=parts)
lm = OptLM(sys.argv[1], policy, device=sys.argv[2], offload_dir=sys.argv[3], progress=False)
embed = InputEmbed.forward

def announced(layer, x, weights, ctx):
    if x.shape[1] == 1:
        print("decoding", flush=True)
    return embed(layer, x, weights, ctx)

InputEmbed.forward = announced
lm.generate([[5, 6, 7]] * 4, int(sys.argv[4]), stop=())
print("done", flush=True)
"""


def run(
    directory: Path, device: str, offload: Path, tokens: int, script: str = SCRIPT
) -> subprocess.Popen[str]:
    arguments = [str(directory), device, str(offload), str(tokens)]
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_exit_with_a_model_that_was_never_closed(device: str, tiny: Any, tmp_path: Path) -> None:
    process = run(tiny("opt").directory, device, tmp_path, 4)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.splitlines()[-1] == "done" and "Error" not in err
    assert not list(tmp_path.iterdir())


def test_ctrl_c_during_generate(tiny: Any, tmp_path: Path) -> None:
    # At this bandwidth the 40 tokens would take several minutes.
    process = run(tiny("opt").directory, "emulated:link=64KiB,disk=64KiB", tmp_path, 40)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "decoding\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGINT
    assert err.rstrip().splitlines()[-1] == "KeyboardInterrupt"
    assert "done" not in out
    assert not list(tmp_path.iterdir())


def test_exit_with_a_stream_that_still_runs(tiny: Any, tmp_path: Path) -> None:
    generate = "lm.generate([[5, 6, 7]] * 4, int(sys.argv[4]), stop=())"
    stream = "stream = lm.stream([[5, 6, 7]] * 4, int(sys.argv[4]), stop=())\nbegun.wait(60)"
    script = SCRIPT.replace(generate, stream).replace('print("decoding", flush=True)', "begun.set()")
    script = "import threading\nbegun = threading.Event()\n" + script
    # At this bandwidth the 40 tokens would take several minutes.
    process = run(tiny("opt").directory, "emulated:link=64KiB,disk=64KiB", tmp_path, 40, script)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0 and not err
    assert out == "done\n"
    assert not list(tmp_path.iterdir())
