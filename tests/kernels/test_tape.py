"""Tapes of compiled calls."""

import subprocess
import sys

import pytest
import torch

from flexgen.kernels.attention import decode_attention
from flexgen.kernels.elementwise import add_, silu_product
from flexgen.kernels.groupwise import quantise
from flexgen.kernels.linear import linear, linears
from flexgen.kernels.loading import native_available
from flexgen.kernels.new_tokens import store_token
from flexgen.kernels.norms import rms_norm
from flexgen.kernels.rotation import rotate_token
from flexgen.kernels.scoring import Scoring
from flexgen.kernels.tape import record, replay

HIDDEN, HEADS, KV_HEADS, DIM = 64, 4, 2, 16

pytestmark = pytest.mark.skipif(not native_available(), reason="no compiled kernels here")


class Layer:
    """A transformer layer of one row, with its cache of six tokens in pages of two."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)

        def matrix(out_size, in_size):
            return (torch.randn(out_size, in_size, generator=generator) / in_size**0.5).bfloat16()

        kv_size = KV_HEADS * DIM
        self.qkv = [matrix(size, HIDDEN) for size in (HIDDEN, kv_size, kv_size)]
        self.out, self.down = matrix(HIDDEN, HIDDEN), matrix(HIDDEN, 96)
        self.gate_up = [matrix(96, HIDDEN) for _ in range(2)]
        self.norm = matrix(1, HIDDEN)[0]
        shape = 1, KV_HEADS, 2, DIM
        self.pages = [tuple(torch.zeros(shape, dtype=torch.bfloat16) for _ in range(2)) for _ in range(3)]
        self.factors = torch.empty(1, 4, 1, DIM // 2, dtype=torch.bfloat16)

    def forward(self, x, position):
        normed = rms_norm(x, self.norm, 1e-5)
        q, k, v = (
            y.view(1, 1, -1, DIM).transpose(1, 2) for y in linears(normed, self.qkv, [None, None, None])
        )
        q, k = rotate_token(q, k, self.factors)
        store_token(self.pages, position, k, v)
        outputs = decode_attention(q, self.pages, position + 1, None, Scoring(0.25))
        x = add_(linear(outputs.transpose(1, 2).reshape(1, 1, -1), self.out), x)
        gate, up = linears(rms_norm(x, self.norm, 1e-5), self.gate_up, [None, None])
        return add_(linear(silu_product(gate, up), self.down), x)


def tokens(count):
    """Hidden states and rotary factors of each token."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(1, 1, HIDDEN, generator=generator).bfloat16()
        yield x, torch.rand(1, 4, 1, DIM // 2, generator=generator).bfloat16()


def test_a_tape_repeats_a_layer_for_later_tokens(variant, monkeypatch):
    monkeypatch.setattr("flexgen.kernels.half_linear._rows", lambda dtype: 8)
    plain, recorded, same_x = Layer(), Layer(), torch.empty(1, 1, HIDDEN).bfloat16()
    for position, (x, factors) in enumerate(tokens(6)):
        plain.factors.copy_(factors)
        recorded.factors.copy_(factors)
        expected = plain.forward(x, position)
        same_x.copy_(x)
        if position == 0:
            y, tape = record(lambda: recorded.forward(same_x, 0))
        else:
            replay([tape], position)
        assert y.equal(expected)
    assert all(a.equal(b) for a, b in zip(sum(plain.pages, ()), sum(recorded.pages, ()), strict=True))
    with pytest.raises(RuntimeError, match="no room for another token"):
        replay([tape], 6)


def test_several_tapes_are_replayed_in_order():
    weight = torch.rand(HIDDEN).bfloat16()
    x = torch.randn(1, HIDDEN).bfloat16()
    y, first = record(lambda: rms_norm(x, weight, 1e-5))
    _, second = record(lambda: add_(x, y))
    before = x.clone()
    for _ in range(3):
        before += rms_norm(before, weight, 1e-5)
        ends = replay([first, second], 0)
    assert x.equal(before) and replay([], 0) == []
    assert len(ends) == 2 and 0 < ends[0] < ends[1]


def test_a_tape_does_not_depend_on_the_threads(monkeypatch):
    layer, (x, factors) = Layer(), next(tokens(1))
    layer.factors.copy_(factors)
    y, tape = record(lambda: layer.forward(x, 0))
    expected = y.clone()
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        replay([tape], 0)
        assert y.equal(expected)


def test_a_tape_keeps_the_tensors_of_its_calls():
    x = torch.randn(3, HIDDEN)
    y, tape = record(lambda: rms_norm(rms_norm(x, None, 1e-5), None, 1e-5))
    assert tape.nbytes == 2 * x.nbytes
    expected = y.clone()
    others = [torch.full_like(x, 7.0) for _ in range(20)]
    y.zero_()
    replay([tape], 0)
    assert y.equal(expected) and all((other == 7).all() for other in others)


@pytest.mark.parametrize(
    "work",
    [
        lambda x: rms_norm(x, None, 1e-5).mul_(2),
        lambda x: rms_norm(x.t().contiguous(), None, 1e-5),
        lambda x: quantise(x, 4, 64).values,
    ],
    ids=["torch", "a copy", "another kernel"],
)
def test_other_work_is_not_recorded(work):
    x = torch.randn(2, HIDDEN)
    result, tape = record(lambda: work(x))
    assert tape is None and result.equal(work(x))


def test_after_an_error_nothing_is_recorded():
    x = torch.randn(2, HIDDEN)
    with pytest.raises(ZeroDivisionError):
        record(lambda: rms_norm(x, None, 1e-5) / (1 // 0))
    _, tape = record(lambda: x)
    y = rms_norm(x, None, 1e-5)
    expected = y.clone()
    y.zero_()
    replay([tape], 0)
    assert not y.count_nonzero() and expected.count_nonzero()


def test_a_recording_does_not_load_the_compiler_of_torch():
    code = (
        "import sys, torch; from flexgen.kernels.norms import rms_norm; from flexgen.kernels.tape import record; "
        "record(lambda: rms_norm(torch.ones(2, 8).view(4, 4), None, 1e-5)); sys.exit('torch._dynamo' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_compiled_kernels_there_is_no_tape(monkeypatch):
    monkeypatch.setenv("FLEXGEN_NATIVE", "0")
    assert record(lambda: 5) == (5, None)
