"""The Triton kernels for encoded matrices against float64. Without a GPU they are also compiled for some: the
interpreter knows nothing of types, layouts and shared memory.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_interpreter import INTERPRETED, SHARED_KIB, check_in_the_interpreter, needs_triton, runs_kernels

from flexgen.kernels.groupwise import dequantise_in_torch, quantise
from flexgen.units import KIB

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The interpreter computes with numpy, which has no bfloat16: it multiplies the bits, and rounds to zero.
MULTIPLIED = [torch.float32, torch.float16] if INTERPRETED else DTYPES


@pytest.fixture(scope="module")
def kernels():
    from flexgen.kernels import triton_groupwise  # its import needs triton

    return triton_groupwise


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_in_the_interpreter():
    check_in_the_interpreter(__file__)


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(
    ("capability", "dtype"),
    [(75, "fp16"), (75, "fp32"), (80, "bf16"), (86, "fp32"), (90, "fp16"), (90, "bf16"), (90, "fp32")],
)
@pytest.mark.parametrize("bits", [4, 8])
def test_compiled_for_a_gpu(kernels, capability, dtype, bits, tmp_path, monkeypatch):
    """Machine code for a T4, an A100, an RTX 3090 and an H100, which needs none of them."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # what another run compiled says nothing
    packed = {"values": "*u8", "scales": "*fp16", "minimums": "*fp16"}
    sizes = dict.fromkeys(("num_rows", "out_size", "in_size"), "i32")
    decode = {**packed, "out": f"*{dtype}", "octets": "i32"}
    multiply = {"x": f"*{dtype}", **packed, "bias": f"*{dtype}", "y": f"*{dtype}", **sizes}
    constants = {"GROUP": 64, "BITS": bits}
    # The most rows of x of one program, which take the most shared memory.
    tile = {"BIASED": True, "ROWS": kernels.MOST_ROWS, "OUT": kernels.OUT, "CODES": kernels.CODES}
    for kernel, signature, more in (
        (kernels._decode, decode, {"BLOCK": kernels._DECODED}),
        (kernels._multiply, multiply, tile),
    ):
        constexprs = {**constants, **more}
        source = ASTSource(kernel, {**signature, **dict.fromkeys(constexprs, "constexpr")}, constexprs)
        found = compile(source, target=GPUTarget("cuda", capability, 32))
        assert found.asm["cubin"]
        assert found.metadata.shared <= SHARED_KIB[capability] * KIB


def test_flexgen_imports_the_kernels_only_when_a_gpu_needs_them():
    code = "import sys, flexgen, flexgen.bench; sys.exit('flexgen.kernels.triton_groupwise' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def packed_case(rows, out, groups, bits, group, dtype, scales=torch.float16):
    device = "cpu" if INTERPRETED else "cuda"
    generator = torch.Generator().manual_seed(rows * 1000 + out)
    x = torch.randn(rows, groups * group, generator=generator).to(dtype)
    weight = torch.randn(out, groups * group, generator=generator) * 0.05 + 0.01
    bias = torch.randn(out, generator=generator).to(dtype)
    packed = quantise(weight.to(device), bits, group, scales)
    return x.to(device), packed, bias.to(device)


@needs_triton
@runs_kernels
@settings(max_examples=25)
@given(
    rows=st.sampled_from([1, 2, 16, 17, 33, 65]),
    out=st.sampled_from([1, 31, 32, 33]),
    groups=st.integers(1, 3),
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([32, 64, 96, 128]),
    dtype=st.sampled_from(MULTIPLIED),
    scales=st.sampled_from([torch.float16, torch.bfloat16]),
    biased=st.booleans(),
)
def test_products(kernels, rows, out, groups, bits, group, dtype, scales, biased):
    x, packed, bias = packed_case(rows, out, groups, bits, group, dtype, scales)
    y = kernels.multiply(x, packed, bias if biased else None)
    # The weights are rounded to the type of x, as decoding them does; the sums are in float32.
    weight = dequantise_in_torch(packed, torch.empty(packed.shape, dtype=dtype, device=x.device)).double()
    exact = x.double() @ weight.T + (bias.double() if biased else 0)
    assert y.dtype is dtype and y.shape == exact.shape
    size = x.double().abs() @ weight.abs().T
    bound = 0.51 * torch.finfo(dtype).eps * exact.abs() + 4e-6 * size + 1e-6
    assert ((y.double() - exact).abs() <= bound).all()


@needs_triton
@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("out", "groups", "group"), [(1, 1, 64), (5, 3, 96), (17, 9, 128)])
def test_decoding_gives_what_torch_gives(kernels, dtype, bits, out, groups, group):
    _, packed, _ = packed_case(1, out, groups, bits, group, dtype)
    expected = dequantise_in_torch(
        packed, torch.empty(packed.shape, dtype=dtype, device=packed.values.device)
    )
    found = kernels.dequantise(packed, torch.full_like(expected, float("nan")))
    # A GPU may fuse the product and the sum.
    unit = 0 if INTERPRETED and dtype is not torch.bfloat16 else torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=unit, atol=0)


@needs_triton
@runs_kernels
def test_trying_a_kernel_out(kernels):
    kernels.try_out(torch.device("cpu" if INTERPRETED else "cuda"))


@needs_triton
@runs_kernels
def test_shapes_of_x_are_kept(kernels):
    x, packed, bias = packed_case(6, 10, 2, 4, 64, torch.float32)
    expected = kernels.multiply(x, packed, bias)
    assert torch.equal(kernels.multiply(x.view(2, 3, 128), packed, bias), expected.view(2, 3, 10))
    strided = torch.stack((x, x), dim=-1)[..., 0]
    assert torch.equal(kernels.multiply(strided, packed, bias), expected)
