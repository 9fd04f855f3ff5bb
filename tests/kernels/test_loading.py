"""Which kernels run, and that the module survives what a process does."""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from flexgen.kernels import loading
from flexgen.kernels.loading import announce, native

needs_native = pytest.mark.skipif(native is None, reason="flexgen.kernels._native is not built")

ATTEND = """
import os, threading
import torch
from flexgen.kernels.attention import decode_attention
from flexgen.kernels.scoring import Scoring
torch.set_num_threads(2)
page = torch.ones(4, 2, 1024, 64), torch.ones(4, 2, 1024, 64)
q = torch.ones(4, 4, 1, 64)
def attend():
    return decode_attention(q, [page], 1000, None, Scoring(0.1))[0, 0, 0, 0].item()
assert abs(attend() - 1) < 1e-4
"""


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def afresh():
    announce.cache_clear()
    yield
    announce.cache_clear()


def test_the_environment_chooses_torch():
    code = "import logging; logging.basicConfig(level='INFO')" + ATTEND
    done = run(
        code + "from flexgen.kernels.loading import native_available; print(native_available())",
        FLEXGEN_NATIVE="0",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False"]
    assert done.stderr.count("CPU kernels: torch, because FLEXGEN_NATIVE is 0") == 1


@needs_native
def test_the_variant_is_announced_once(afresh, caplog, monkeypatch):
    monkeypatch.delenv("FLEXGEN_NATIVE", raising=False)
    caplog.set_level(logging.INFO)
    assert announce()
    assert announce()
    assert [record.message for record in caplog.records] == [f"CPU kernels: compiled, {native.variant()}"]


def test_a_missing_build_is_a_warning(afresh, caplog, monkeypatch):
    monkeypatch.setattr(loading, "native", None)
    monkeypatch.delenv("FLEXGEN_NATIVE", raising=False)
    assert not announce()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "install a C++17 compiler" in caplog.text


GPU = torch.device("cuda", 0)


@pytest.fixture
def with_triton(monkeypatch):
    """`with_triton(module)`: a GPU and Triton, whose kernels are in `module`, or an error of their import."""
    loading.triton_kernels.cache_clear()
    importing = importlib.import_module

    def there(kernels):
        def load(name):
            if name != "flexgen.kernels.triton_groupwise":
                return importing(name)
            if isinstance(kernels, Exception):
                raise kernels
            return kernels

        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        monkeypatch.setattr(importlib, "import_module", load)

    yield there
    loading.triton_kernels.cache_clear()


def test_triton_is_used_once_a_kernel_ran(with_triton, caplog):
    caplog.set_level(logging.INFO)
    tried = []
    kernels = SimpleNamespace(try_out=tried.append)
    with_triton(kernels)
    assert loading.triton_kernels(GPU) is loading.triton_kernels(GPU) is kernels
    assert tried == [GPU]
    assert [record.message for record in caplog.records] == ["kernels on cuda:0: Triton"]


def raises(error):
    def try_out(device):
        raise error

    return SimpleNamespace(try_out=try_out)


@pytest.mark.parametrize(
    ("kernels", "said"),
    [
        (raises(RuntimeError("Failed to find C compiler.")), "RuntimeError: Failed to find C compiler."),
        (raises(subprocess.CalledProcessError(1, "gcc")), "CalledProcessError: Command 'gcc' returned"),
        (raises(AssertionError()), "(AssertionError: )"),
        (ImportError("libcuda.so cannot open"), "ImportError: libcuda.so cannot open"),
    ],
)
def test_where_triton_cannot_launch_torch_decodes(with_triton, caplog, kernels, said):
    with_triton(kernels)
    assert loading.triton_kernels(GPU) is None and loading.triton_kernels(GPU) is None
    (record,) = caplog.records
    assert record.levelname == "WARNING" and said in record.message
    assert record.message.startswith("kernels on cuda:0: torch, which decodes weights several times slower")


def test_no_kernel_is_tried_without_a_gpu(with_triton):
    with_triton(raises(AssertionError("no GPU is here")))
    assert loading.triton_kernels(torch.device("cpu")) is None


@needs_native
def test_variants_are_chosen_by_name():
    assert native.variants()[-1] == "baseline"
    assert native.variant() in native.variants()
    with pytest.raises(ValueError, match="no variant sse9 on this processor"):
        native.set_variant("sse9")


@needs_native
def test_a_child_after_fork_computes_on_threads_of_its_own():
    code = """
child = os.fork()
if not child:
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(4) as callers:
        results = list(callers.map(lambda _: attend(), range(200)))
    os._exit(0 if max(results) == min(results) == results[0] else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    done = run(ATTEND + code)
    assert done.returncode == 0, done.stderr


@needs_native
def test_the_interpreter_exits_while_a_thread_computes():
    # Without torch in the loop, which aborts when its own calls are cut off so.
    code = """
from flexgen.kernels.loading import native
memory = torch.ones(4 << 20, dtype=torch.uint8)
def forever():
    while True: native.read(memory.data_ptr(), memory.nbytes, 2)
threading.Thread(target=forever, daemon=True).start()
"""
    done = run(ATTEND + code)
    assert done.returncode == 0, done.stderr
