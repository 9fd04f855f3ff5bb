"""What the libraries of each device take in addition to operands and results."""

import pytest
import torch

from flexgen.kernels import half_linear
from flexgen.kernels.loading import native_available
from flexgen.kernels.workspaces import GPU, HOST, GpuWorkspaces, choice_bytes, choice_rows, gpu_workspaces
from flexgen.units import MIB

OLD_GPU = GpuWorkspaces(native_bfloat16=False)
SHAPE = 2, 16, 256, 256, 64  # rows, heads, queries, keys, head_dim


def test_only_the_host_widens_half_types(monkeypatch):
    monkeypatch.setattr(half_linear, "has_products", lambda dtype: dtype is not torch.float16)
    assert HOST.product(1024, 512, 512, torch.float16) > 0
    assert HOST.product(1024, 512, 512, torch.float32) == 0
    assert GPU.product(1024, 512, 512, torch.float16) == 0
    assert HOST.fixed == 0 < GPU.fixed


@pytest.mark.skipif(not native_available(), reason="the compiled kernels are not built")
def test_a_compiled_norm_takes_nothing_and_one_in_torch_two_copies(monkeypatch):
    assert HOST.rms_norm(100, 64, torch.bfloat16) == 0
    copies = 2 * 100 * 64 * torch.float32.itemsize
    assert copies < HOST.rms_norm(100, 64, torch.float64) < 1.1 * copies
    monkeypatch.setenv("FLEXGEN_NATIVE", "0")
    assert copies < HOST.rms_norm(100, 64, torch.bfloat16) < 1.1 * copies
    assert GPU.rms_norm(100, 64, torch.bfloat16) == HOST.rms_norm(100, 64, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_only_emulated_bfloat16_builds_scores(dtype):
    scores = 2 * 16 * 256 * 256 * torch.float32.itemsize
    assert max(GPU.attention(*SHAPE, dtype), HOST.attention(*SHAPE, dtype)) < scores
    assert (OLD_GPU.attention(*SHAPE, dtype) > 2 * scores) == (dtype is torch.bfloat16)


@pytest.mark.parametrize(
    ("gpu", "dtype", "head_dim", "taken"),
    [
        (GPU, torch.float32, 256, 0),
        (GPU, torch.float16, 64, 4 * 32 * 256),  # sums alone
        (GPU, torch.float16, 128, 4 * 32 * 256 + 2 * 32 * 256 * 129 * 4),  # the results of two parts too
        (OLD_GPU, torch.float16, 128, 0),
        (OLD_GPU, torch.float16, 256, 4 * 32 * 256 * 256),  # the result in float32
    ],
)
def test_attention_of_a_prompt_takes(gpu, dtype, head_dim, taken):
    assert gpu.attention(2, 16, 256, 256, head_dim, dtype) == taken


@pytest.mark.parametrize(
    ("capability", "mib", "native"),
    [(7.5, 8.125, False), (8.0, 8.125, True), (8.9, 8.125, True), (9.0, 32, True), (12.0, 32, True)],
)
def test_a_compute_capability_says_what_libraries_take(capability, mib, native):
    gpu = gpu_workspaces(capability)
    assert (gpu.fixed, gpu.native_bfloat16) == (mib * MIB, native)


def test_what_drawing_takes_is_bounded_whatever_the_rows():
    assert choice_bytes(3, 1000) < choice_bytes(4, 1000)
    assert choice_bytes(10_000, 128_256) == choice_bytes(100_000, 128_256) <= 64 * MIB
    assert choice_rows(10**9) == 1  # not even one row is within the bound
