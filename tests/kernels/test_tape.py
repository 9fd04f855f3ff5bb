"""Tapes of compiled calls."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from flexgen.kernels.attention import decode_attention
from flexgen.kernels.elementwise import add_, silu_product
from flexgen.kernels.groupwise import quantise
from flexgen.kernels.linear import linear, linears
from flexgen.kernels.loading import native_available
from flexgen.kernels.new_tokens import store_tokens
from flexgen.kernels.norms import rms_norm
from flexgen.kernels.rotation import rotate_token
from flexgen.kernels.scoring import Scoring
from flexgen.kernels.tape import profiled, record, replay

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
        store_tokens(self.pages, position, k, v)
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
        replay([tape], position)
        assert y.equal(expected)
    assert all(a.equal(b) for a, b in zip(sum(plain.pages, ()), sum(recorded.pages, ()), strict=True))
    with pytest.raises(RuntimeError, match="no room for another token"):
        replay([tape], 6)


def test_a_tape_reads_the_lengths_of_rows_again():
    """Two rows with three new tokens each, after numbers of tokens of their own at a fixed address."""
    lengths = torch.zeros(2, 2, dtype=torch.int64)
    q, k, v = (torch.empty(2, 3, n, DIM).bfloat16().transpose(1, 2) for n in (HEADS, KV_HEADS, KV_HEADS))
    taped, plain = (
        [tuple(torch.zeros(2, KV_HEADS, 8, DIM).bfloat16() for _ in range(2)) for _ in range(3)]
        for _ in range(2)
    )

    def step(pages):
        store_tokens(pages, lengths[0], k, v)
        return decode_attention(q, pages, lengths[1], None, Scoring(0.25))

    def begin(before, seed):
        lengths.copy_(torch.tensor([before, [n + 3 for n in before]]))
        for x in (q, k, v):
            x.normal_(generator=torch.Generator().manual_seed(seed))

    begin([0, 4], 0)
    y, tape = record(lambda: step(taped))
    for seed, before in enumerate(([0, 4], [2, 7], [5, 19], [1, 0])):
        begin(before, seed)
        replay([tape], 0)
        assert y.equal(step(plain))
        assert all(a.equal(b) for a, b in zip(sum(taped, ()), sum(plain, ()), strict=True))
    begin([0, 22], 9)
    with pytest.raises(RuntimeError, match="no room for another token"):
        replay([tape], 0)


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
    replay([tape], 0)
    expected = y.clone()
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        replay([tape], 0)
        assert y.equal(expected)


def large_products():
    """Work that threads share: three products with 1 MiB each, with small kernels between them."""
    generator = torch.Generator().manual_seed(0)
    matrices = [(torch.randn(512, 1024, generator=generator) / 32).bfloat16() for _ in range(3)]
    x = torch.randn(1, 1024, generator=generator).bfloat16()
    weight = torch.ones(512).bfloat16()

    def work():
        gate, up = linears(x, matrices[:2], [None, None])
        gate = add_(rms_norm(linear(x, matrices[2]), weight, 1e-5), gate)
        return silu_product(gate, up)

    return work


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_threads_share_the_work_of_a_tape(threads, variant, monkeypatch):
    monkeypatch.setattr("flexgen.kernels.half_linear._rows", lambda dtype: 8)
    work = large_products()
    expected = work()
    y, tape = record(work)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for n in range(20):
        y.zero_()
        replay([tape] * (1 + n % 3), 0)
        assert y.equal(expected)


def test_tapes_that_several_threads_replay_at_once(monkeypatch):
    monkeypatch.setattr("flexgen.kernels.half_linear._rows", lambda dtype: 8)
    works = [large_products() for _ in range(3)]  # they own the matrices
    tapes = [record(work) for work in works]
    expected = works[0]()
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda tape: replay([tape] * 20, 0), [tape for _, tape in tapes]))
    assert all(y.equal(expected) for y, _ in tapes)


def test_a_profile_has_the_name_and_the_time_of_each_call(monkeypatch):
    monkeypatch.setattr("flexgen.kernels.half_linear._rows", lambda dtype: 8)
    work = large_products()
    expected = work()
    y, tape = record(work)
    with profiled() as replays:
        ends = replay([tape, tape], 0)
    names = ["product of 1024 with 512 512", "product of 1024 with 512", "rms_norm", "add", "silu"]
    calls = replays[0].calls
    assert [name for name, _ in calls] == 2 * names and all(seconds > 0 for _, seconds in calls)
    assert sum(seconds for _, seconds in calls) <= replays[0].end - replays[0].start
    assert y.equal(expected) and len(ends) == 2
    replay([tape], 0)
    assert len(replays) == 1


def test_a_tape_keeps_the_tensors_of_its_calls():
    x = torch.randn(3, HIDDEN)
    y, tape = record(lambda: rms_norm(rms_norm(x, None, 1e-5), None, 1e-5))
    assert [result.shape for result in tape.tensors] == [x.shape, x.shape]
    expected = rms_norm(rms_norm(x, None, 1e-5), None, 1e-5)
    others = [torch.full_like(x, 7.0) for _ in range(20)]
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
    before = x.clone()
    assert record(lambda: work(x)) is None
    assert work(x).isfinite().all() and x.equal(before)  # kernels run again


def test_a_recording_computes_nothing():
    x, weight = torch.randn(2, HIDDEN), torch.rand(HIDDEN)
    before = x.clone()
    y, tape = record(lambda: add_(x, rms_norm(x, weight, 1e-5)))
    assert y is x and x.equal(before)
    replay([tape], 0)
    assert x.equal(before + rms_norm(before, weight, 1e-5))


def test_a_recording_ends_before_the_first_operation_of_torch():
    x = torch.zeros(2, HIDDEN)
    assert record(lambda: x.add_(1)) is None and not x.any()


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
    assert record(lambda: 5) is None


def test_results_are_in_spare_tensors_of_their_kind():
    x = torch.randn(3, HIDDEN)
    spare = [torch.zeros(2, HIDDEN), torch.zeros(3, HIDDEN), torch.zeros(3, HIDDEN, dtype=torch.bfloat16)]
    y, tape = record(lambda: rms_norm(rms_norm(x, None, 1e-5), None, 1e-5), spare)
    first, second = tape.tensors
    assert first is spare[1] and second.data_ptr() == y.data_ptr() not in [some.data_ptr() for some in spare]
    replay([tape], 0)
    assert torch.allclose(first, rms_norm(x, None, 1e-5)) and not spare[0].any() and not spare[2].any()
