"""The measured call of a benchmark finds the GPU warmed up: no product has a shape that is new there."""

from unittest.mock import patch

import pytest

pytest.importorskip("simulated", reason="runs on the simulated GPU: `make test-cuda`")

from simulated import cases
from simulated.threads import in_every_thread
from torch.utils._python_dispatch import TorchDispatchMode

from flexgen import OptLM, bench

PRODUCTS = ("aten.mm", "aten.addmm", "aten.linear")
FLAGS = ["--weights", "dummy", "--device", "cuda", "--prompt-len", "9", "--gen-len", "5", "--no-bound"]
BLOCKS = ["--gpu-batch-size", "2", "--num-gpu-batches", "2", "--num-prompts", "10"]


def products_of_each_call(folder, *flags):
    """By call of `generate`, the products that ran on the GPU: operation, shapes and strides."""
    calls, generate = [], OptLM.generate

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if calls and str(func).startswith(PRODUCTS):
                tensors = [arg for arg in args if hasattr(arg, "stride") and arg.is_cuda]
                calls[-1].add((str(func), *((tuple(t.shape), t.stride()) for t in tensors)))
            return func(*args, **kwargs or {})

    def counted(model, *args, **kwargs):
        calls.append(set())
        return generate(model, *args, **kwargs)

    with in_every_thread(Recorded), patch.object(OptLM, "generate", counted):
        assert bench.main(["--model", str(folder), *FLAGS, *BLOCKS, *flags]) == 0
    return calls


def test_the_measured_call_has_no_new_shape(tmp_path):
    cases.OPT.save_pretrained(tmp_path)
    warm, measured = products_of_each_call(tmp_path)
    assert measured and measured <= warm


def test_a_warm_up_can_be_left_out(tmp_path):
    cases.OPT.save_pretrained(tmp_path)
    assert len(products_of_each_call(tmp_path, "--no-warm-up")) == 1
