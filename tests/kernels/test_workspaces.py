"""What the libraries of each device take in addition to operands and results."""

import pytest
import torch

from flexgen.kernels import half_linear
from flexgen.kernels.workspaces import GPU, HOST, GpuWorkspaces, choice_bytes, choice_rows
from flexgen.units import MIB

OLD_GPU = GpuWorkspaces(native_bfloat16=False)
SHAPE = 2, 16, 256, 256, 64  # rows, heads, queries, keys, head_dim


def test_only_the_host_widens_half_types(monkeypatch):
    monkeypatch.setattr(half_linear, "_WIDENED", frozenset({torch.float16}))
    assert HOST.product(1024, 512, 512, torch.float16) > 0
    assert HOST.product(1024, 512, 512, torch.float32) == 0
    assert GPU.product(1024, 512, 512, torch.float16) == 0
    assert HOST.fixed == 0 < GPU.fixed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_only_emulated_bfloat16_builds_scores(dtype):
    scores = 2 * 16 * 256 * 256 * torch.float32.itemsize
    assert GPU.attention(*SHAPE, dtype) == HOST.attention(*SHAPE, dtype) == 0
    assert (OLD_GPU.attention(*SHAPE, dtype) > 2 * scores) == (dtype is torch.bfloat16)


def test_what_drawing_takes_is_bounded_whatever_the_rows():
    assert choice_bytes(3, 1000) < choice_bytes(4, 1000)
    assert choice_bytes(10_000, 128_256) == choice_bytes(100_000, 128_256) <= 64 * MIB
    assert choice_rows(10**9) == 1  # not even one row is within the bound
