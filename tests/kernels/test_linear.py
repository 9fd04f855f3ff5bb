import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from flexgen import OptLM, Policy
from flexgen.kernels import groupwise_linear, half_linear
from flexgen.kernels.groupwise import dequantise_in_torch, quantise
from flexgen.kernels.groupwise_linear import GroupwiseMatrix
from flexgen.kernels.linear import has_prelayout, linear, linears, prelayout

needs_prelayout = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    reason="no bfloat16 products in oneDNN here",
)


@needs_prelayout
@given(
    out_size=st.integers(1, 80),
    in_size=st.integers(1, 80),
    rows=st.integers(1, 40),
    biased=st.booleans(),
    seed=st.integers(0, 99),
)
def test_products_of_a_prelayout_are_those_of_the_matrix(out_size, in_size, rows, biased, seed):
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (
        torch.randn(*s, generator=generator) for s in ((2, rows, in_size), (out_size, in_size), (out_size,))
    )
    x, weight, bias = x.bfloat16(), weight.bfloat16(), bias.bfloat16() if biased else None
    found = linear(x, prelayout(weight), bias)
    exact = F.linear(x.double(), weight.double(), bias.double() if biased else None)
    assert found.shape == exact.shape and found.dtype is torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2**-7, atol=2**-6)


@needs_prelayout
def test_a_prelayout_keeps_every_bit():
    weight = torch.randn(33, 17).bfloat16()
    assert prelayout(weight).to_dense().equal(weight)


@needs_prelayout
def test_a_prelayout_is_for_processors_on_which_the_compiled_kernel_is_slower(monkeypatch):
    monkeypatch.setattr(half_linear, "has_products", lambda dtype: True)
    for rows, expected in {0: True, 8: True, 128: False}.items():
        monkeypatch.setattr(half_linear, "native_rows", lambda dtype, rows=rows: rows)
        assert has_prelayout(torch.bfloat16) == expected


def test_other_types_are_left_alone():
    assert not has_prelayout(torch.float32) and not has_prelayout(torch.float16)
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    assert linear(x, weight).equal(F.linear(x, weight))


@needs_prelayout
def test_the_engine_lays_out_what_it_multiplies_and_only_that(monkeypatch):
    """Same logits with and without, and the embedding stays a table (tied here, so the head is one too)."""
    logits = []
    for laid_out in (True, False):
        monkeypatch.setattr("flexgen.memory.gpu.has_prelayout", lambda dtype, laid_out=laid_out: laid_out)
        with OptLM("opt-125m", Policy(), device="cpu", dtype="bfloat16", weights="dummy") as model:
            seen = model._model.weights.weights(1, slot=0, visit=0)
            assert seen["q.weight"].is_mkldnn is laid_out and not seen["q.bias"].is_mkldnn
            assert not model._model.weights.weights(0, slot=0, visit=0)["embed.weight"].is_mkldnn
            logits.append(model.forward([[5, 6, 7, 8]]))
    torch.testing.assert_close(
        logits[0], logits[1], rtol=0.02, atol=0.04
    )  # sums in another order, rounded 24 times


@needs_prelayout
@pytest.mark.parametrize("laid_out", [1, 2])
def test_several_products_with_weights_that_are_laid_out(laid_out):
    """All of them, or the first one only."""
    x, weights = torch.randn(1, 256).bfloat16(), [torch.randn(n, 256).bfloat16() for n in (512, 128)]
    given = [prelayout(weight) for weight in weights[:laid_out]] + weights[laid_out:]
    for y, weight in zip(linears(x, given, [None, None]), given, strict=True):
        assert y.equal(linear(x, weight))


FORMS = ["plain", "int4", "int8", "int4_a8", "mixed"]


def matrices(form, dtype, sizes, in_size):
    """A matrix (size, in_size) for each of `sizes`. "mixed": of different forms."""
    if form == "mixed":
        kinds = zip(sizes, ["int4", "int8", "plain"], strict=False)
        return [matrix for size, kind in kinds for matrix in matrices(kind, dtype, [size], in_size)]
    plain = [torch.randn(size, in_size).to(dtype) for size in sizes]
    if form == "plain":
        return plain
    return [groupwise(weight, form) for weight in plain]


def groupwise(weight, form):
    packed = quantise(weight.float(), 8 if form == "int8" else 4, 64)
    decoded = dequantise_in_torch(packed, torch.empty(packed.shape, dtype=weight.dtype))
    return GroupwiseMatrix(packed, weight.dtype, lambda: decoded, rounded=form == "int4_a8")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [(1, 1), (2,), (3, 5), (300,)])
def test_several_products_are_those_of_each_matrix(version, form, dtype, rows, monkeypatch):
    if version == "torch":
        monkeypatch.setattr(half_linear, "announce", lambda: False)
        monkeypatch.setattr(groupwise_linear, "announce", lambda: False)
    torch.manual_seed(len(form))
    x, sizes = torch.randn(*rows, 192).to(dtype), (100, 1, 37)
    several = matrices(form, dtype, sizes, 192)
    biases = [torch.randn(100).to(dtype), None, torch.randn(37).to(dtype)]
    found = linears(x, several, biases)
    expected = [linear(x, matrix, bias) for matrix, bias in zip(several, biases, strict=True)]
    assert [y.shape for y in found] == [(*rows, size) for size in sizes]
    assert all(y.equal(each) for y, each in zip(found, expected, strict=True))


@pytest.mark.parametrize("form", ["plain", "int4"])
def test_one_call_multiplies_matrices_of_one_form(variant, form, monkeypatch):
    calls = []
    module = half_linear if form == "plain" else groupwise_linear
    several = module.multiply_all_natively
    monkeypatch.setattr(module, "multiply_all_natively", lambda *args: calls.append(1) or several(*args))
    monkeypatch.setattr(half_linear, "_rows", lambda dtype: 8)
    x = torch.randn(1, 1, 128).bfloat16()
    first, second = matrices(form, torch.bfloat16, (2000, 900), 128)
    linears(x, [first, second], [None, None])
    assert len(calls) == 1


@pytest.mark.parametrize("form", ["plain", "int4"])
def test_several_products_do_not_depend_on_the_threads(variant, form, monkeypatch):
    torch.manual_seed(0)
    x, found = torch.randn(3, 2048).bfloat16(), []
    several = matrices(form, torch.bfloat16, (700, 300), 2048)
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(linears(x, several, [None, None]))
    assert all(y.equal(same) for each in found for y, same in zip(each, found[0], strict=True))
