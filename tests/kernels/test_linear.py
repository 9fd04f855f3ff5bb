import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from flexgen import OptLM, Policy
from flexgen.kernels import half_linear
from flexgen.kernels.linear import has_prelayout, linear, prelayout

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
