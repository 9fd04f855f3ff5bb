"""A model belongs to the process that opened it: forks, pickles and copies raise an error, and never hang."""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexgen import OptLM
from flexgen.errors import RequestError

SCRIPT = """
import os, sys, traceback
from flexgen import OptLM, Policy
from flexgen.errors import RequestError

parts = {"gpu": 34, "cpu": 33, "disk": 33}
policy = Policy(gpu_batch_size=2, num_gpu_batches=2, weights=parts, cache=parts, activations=parts)
lm = OptLM(sys.argv[1], policy, device=sys.argv[2], offload_dir=sys.argv[3], progress=False)
expected = lm.generate([[5, 6, 7]] * 4, 4, stop=())
stream = lm.stream([[5, 6, 7]], 4, stop=())
pid = os.fork()
if not pid:
    calls = (
        lambda: lm.generate([[5, 6, 7]] * 4, 4),
        lambda: lm.forward([[5, 6, 7]]),
        lambda: list(lm.stream([[5, 6, 7]], 4)),
        lambda: next(stream),
    )
    for call in calls:
        try:
            call()
        except RequestError as error:
            assert "fork" in str(error) and "child" in str(error), error
        else:
            os._exit(1)
    stream.close()
    lm.close()
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
streamed = list(stream)
assert [number for number, _ in streamed] == [0], streamed
assert (lm.generate([[5, 6, 7]] * 4, 4, stop=()) == expected).all()
lm.close()
print("done")
"""


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_a_forked_child_is_refused_and_ends(device: str, tiny: Any, tmp_path: Path) -> None:
    arguments = [str(tiny("opt").directory), device, str(tmp_path)]
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, timeout=120
    )
    assert (ended.returncode, ended.stdout) == (0, "done\n"), ended.stderr
    assert not list(tmp_path.iterdir())


INSIDE = """
import os, sys
from flexgen import OptLM, Policy
from flexgen.engine.completion import Completion
from flexgen.runtime.request import read_request

parts = {"gpu": 34, "cpu": 33, "disk": 33}
policy = Policy(gpu_batch_size=2, num_gpu_batches=2, weights=parts, cache=parts, activations=parts)
lm = OptLM(sys.argv[1], policy, device=sys.argv[2], offload_dir=sys.argv[3], progress=False)
request, children = read_request(lm.spec, [[5, 6, 7]] * 4), []

def listen(new):
    if not children:
        children.append(os.fork())
        if not children[0] and sys.argv[4] == "exits":
            sys.exit(7)

ids = lm.generate_with(Completion(request, 4, lm.sampled(stop=())), listeners=[listen])
expected = {"exits": 7, "continues": 1}[sys.argv[4]]
assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == expected
assert (lm.generate([[5, 6, 7]] * 4, 4, stop=()) == ids).all()
lm.close()
print("done")
"""


@pytest.mark.parametrize("child", ["exits", "continues"])
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_a_child_that_is_forked_within_a_call_ends(
    device: str, child: str, tiny: Any, tmp_path: Path
) -> None:
    arguments = [str(tiny("opt").directory), device, str(tmp_path), child]
    process = subprocess.Popen(
        [sys.executable, "-c", INSIDE, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # a child that hangs holds the pipes
    assert (process.returncode, out) == (0, "done\n"), err
    assert ("forked" in err or "fork of it" in err) == (child == "continues"), err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("way", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_model_is_not_copied_and_says_how_instead(
    way: Callable[[Any], Any], tiny: Any, prompts: Any, mixed: Any
) -> None:
    policy = mixed()
    assert pickle.loads(pickle.dumps(policy)) == policy
    with OptLM(tiny("opt").directory, policy, device="cpu", progress=False) as lm:
        with pytest.raises(RequestError, match=r"call OptLM\(\.\.\.\) in the worker"):
            way(lm)
        np.testing.assert_array_equal(
            lm.generate(prompts([5]), 2, stop=()), tiny("opt").greedy(prompts([5]), 2)
        )
