"""The Triton kernel for groups of rows against float64, in the same two ways as `test_triton_groupwise`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from triton_interpreter import INTERPRETED, SHARED_KIB, check_in_the_interpreter, needs_triton, runs_kernels

from flexgen.kernels import grouped_matrices as module
from flexgen.kernels.encoded_linear import Code, EncodedForm, EncodedMatrix, EncodedParts
from flexgen.kernels.grouped_matrices import grouped_matrices
from flexgen.quant import codec_for
from flexgen.units import KIB

DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter computes with numpy, which has no bfloat16.
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def kernels():
    from flexgen.kernels import triton_grouped  # its import needs triton

    return triton_grouped


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_in_the_interpreter():
    check_in_the_interpreter(__file__)


FORMS = {"plain": (0, False), "int4": (4, False), "int8": (8, False), "fp8": (8, True)}


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(
    ("capability", "dtype"), [(75, "fp16"), (80, "bf16"), (89, "bf16"), (90, "bf16"), (90, "fp32")]
)
@pytest.mark.parametrize("name", FORMS)
def test_compiled_for_a_gpu(kernels, capability, dtype, name, tmp_path, monkeypatch):
    """For a T4 too, which has no instructions for floats of 8 bits."""
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    bits, e4m3 = FORMS[name]
    signature = {"x": f"*{dtype}", "ends": "*i32", "addresses": "*i64", "y": f"*{dtype}"}
    signature |= dict.fromkeys(("out_size", "in_size", "groups"), "i32")
    constants = {
        "SCALE": tl.float32 if e4m3 else tl.float16, "GROUP": 64, "BITS": bits, "E4M3": e4m3, "BIASED": True,
        "GROUPS": 128, "ROWS": kernels.MOST_ROWS, "OUT": kernels.OUT, "CODES": kernels.CODES,
    }  # fmt: skip
    source = ASTSource(
        kernels._multiply_groups, {**signature, **dict.fromkeys(constants, "constexpr")}, constants
    )
    found = compile(source, target=GPUTarget("cuda", capability, 32))
    assert found.asm["cubin"]
    assert found.metadata.shared <= SHARED_KIB[capability] * KIB


def matrices_in(form, count, out, size, dtype):
    """Matrices of one form in buffers of their own, and their values in float64."""
    generator = torch.Generator().manual_seed(out)
    made, exact = [], []
    for _ in range(count):
        matrix = (torch.randn(out, size, generator=generator) * 0.05 + 0.01).to(dtype).to(DEVICE)
        if form != "plain":
            codec = codec_for(form, matrix.shape)
            encoded = codec.encode(matrix)
            decoded = torch.empty_like(matrix)
            codec.decode(encoded, decoded)
            matrix, values = codec.matrix(encoded, matrix.shape, dtype, None), decoded
        else:
            values = matrix
        made.append(matrix)
        exact.append(values.double())
    return made, exact


@needs_triton
@runs_kernels
@settings(max_examples=25, deadline=None)
@given(
    form=st.sampled_from(sorted(FORMS)),
    counts=st.lists(st.sampled_from([0, 0, 1, 2, 15, 16, 17, 40]), min_size=1, max_size=9),
    out=st.sampled_from([1, 31, 32, 33]),
    size=st.sampled_from([64, 128, 192]),
    dtype=st.sampled_from(DTYPES),
    biased=st.booleans(),
)
@example(form="int4", counts=[0, 0, 0], out=8, size=64, dtype=torch.float32, biased=False)
@example(form="fp8", counts=[0, 70, 0, 1, 0], out=33, size=128, dtype=torch.float32, biased=True)
def test_products(kernels, form, counts, out, size, dtype, biased):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "triton_grouped", lambda device: kernels)
        patch.setattr(module.grouped, "available", lambda device, dtype: False)
        made, exact = matrices_in(form, len(counts), out, size, dtype)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(sum(counts), size, generator=generator).to(dtype).to(DEVICE)
        biases = [torch.randn(out, generator=generator).to(dtype).to(DEVICE) for _ in counts]
        ends = torch.tensor(counts, device=DEVICE).cumsum(0).int()
        y = grouped_matrices(made, biases if biased else None, dtype).multiply(x, ends)
    assert y.dtype is dtype and y.shape == (len(x), out)
    begin = 0
    for count, matrix, bias in zip(counts, exact, biases, strict=True):
        rows = x[begin : begin + count].double()
        product = rows @ matrix.T + (bias.double() if biased else 0)
        bound = 0.51 * torch.finfo(dtype).eps * product.abs() + 4e-6 * (rows.abs() @ matrix.abs().T) + 1e-6
        assert ((y[begin : begin + count].double() - product).abs() <= bound).all()
        begin += count


@needs_triton
@runs_kernels
def test_every_code_of_fp8_has_its_value(kernels, monkeypatch):
    """All codes but the two of NaN, subnormal ones and zeros among them, multiplied by one."""
    monkeypatch.setattr(module, "triton_grouped", lambda device: kernels)
    codes = torch.arange(256, dtype=torch.uint8)
    codes[(codes & 127) == 127] = 0
    values = codes.view(torch.float8_e4m3fn).float()
    (matrix,), _ = matrices_in("fp8", 1, 256, 64, torch.float32)
    matrix.codes.zero_()
    matrix.codes[:, 0], matrix.scales[:] = codes.to(DEVICE), 1.0
    x = torch.zeros(1, 64, device=DEVICE)
    x[:, 0] = 1
    ends = torch.ones(1, dtype=torch.int32, device=DEVICE)
    assert torch.equal(grouped_matrices([matrix], None, torch.float32).multiply(x, ends)[0].cpu(), values)


@needs_triton
@runs_kernels
def test_fp8_of_checkpoints_with_a_scale_for_each_row(kernels, monkeypatch):
    monkeypatch.setattr(module, "triton_grouped", lambda device: kernels)
    values, scales = torch.randn(33, 64).to(torch.float8_e4m3fn), torch.rand(33, 1) + 0.5
    parts = tuple(part.to(DEVICE) for part in (values, scales))
    encoded = EncodedParts(EncodedForm(Code.E4M3, group=0), parts, (33, 64))
    matrix = EncodedMatrix(encoded, torch.float32, lambda: pytest.fail("it is decoded"))
    x, ends = torch.randn(5, 64).to(DEVICE), torch.tensor([5], dtype=torch.int32, device=DEVICE)
    y = grouped_matrices([matrix], None, torch.float32).multiply(x, ends)
    torch.testing.assert_close(y.cpu(), x.cpu() @ (values.float() * scales).T)


@pytest.mark.parametrize(
    "form", [EncodedForm(Code.E4M3, 128, scale_rows=128), EncodedForm(Code.E2M1, 32)], ids=str
)
def test_other_formats_of_checkpoints_have_no_kernel_for_groups(form):
    parts = torch.zeros(128, 128, dtype=torch.uint8), torch.ones(1, 1)
    assert EncodedMatrix(EncodedParts(form, parts, (128, 128)), torch.float32, torch.Tensor).stored is None
