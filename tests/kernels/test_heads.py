"""Encoded heads: the contents of a page, and attention over it compared with float64 over the decoded values."""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexgen.kernels import groupwise
from flexgen.kernels.attention import attend_in_torch, decode_attention
from flexgen.kernels.heads import GroupwiseHeads, PlainHeads
from flexgen.kernels.scoring import Scoring

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NO_NUMBER = 255  # a scale of such bytes is NaN

# The fixture is the same for all examples of a test.
relaxed = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])

# Groups that fill vectors, that end within one, and that are shorter than one.
EVEN = st.builds(
    lambda bits, groups, group: GroupwiseHeads(groups * group, bits, group),
    st.sampled_from([4, 8]),
    st.integers(1, 3),
    st.one_of(st.integers(1, 20).map(lambda half: 2 * half), st.sampled_from([64, 80, 96, 100, 112])),
)

ODD = st.integers(1, 40).map(lambda half: GroupwiseHeads(2 * half - 1, 8, 2 * half - 1))
FORMS = st.one_of(EVEN, EVEN, ODD)


def exact(stored, form):
    """The values in float64, read byte by byte as the format is described."""
    scales_end = form.head_dim // form.group * 4
    pairs = stored[..., :scales_end].contiguous().view(torch.float16).double().unflatten(-1, (-1, 2))
    codes = stored[..., scales_end : scales_end + form.head_dim * form.bits // 8].long()
    codes = codes.unflatten(-1, (-1, form.group * form.bits // 8))
    if form.bits == 4:
        codes = torch.cat((codes % 16, codes // 16), dim=-1)
    return (codes * pairs[..., :1] + pairs[..., 1:]).flatten(-2)


class Case:
    """Random queries and an encoded cache, cut into pages; what is not valid is no number."""

    def __init__(self, form, dtype, rows, kv_heads, group, pages, length, starts=None):
        generator = torch.Generator().manual_seed(rows * 1000 + form.head_dim)
        shape = (rows, kv_heads, sum(pages), form.head_dim)
        self.q = torch.randn(rows, kv_heads * group, 1, form.head_dim, generator=generator).to(dtype)
        k, v = (form.encode((torch.randn(shape, generator=generator) + 0.3).to(dtype)) for _ in range(2))
        k[:, :, length:] = v[:, :, length:] = NO_NUMBER
        self.k, self.v, self.form, self.length = k, v, form, length
        self.pages = [
            (a.contiguous(), b.contiguous())
            for a, b in zip(k.split(pages, 2), v.split(pages, 2), strict=True)
        ]
        self.starts = None if starts is None else torch.tensor([min(s, length - 1) for s in starts[:rows]])
        self.scale = 1 / math.sqrt(form.head_dim)
        self.arguments = self.q, self.pages, length, self.starts, Scoring(self.scale), form

    def expected(self):
        group = self.q.shape[1] // self.k.shape[1]
        k, v = (
            exact(x[:, :, : self.length], self.form).repeat_interleave(group, dim=1) for x in (self.k, self.v)
        )
        scores = self.q.double() @ k.mT * self.scale
        if self.starts is not None:
            padding = torch.arange(self.length) < self.starts[:, None]
            scores.masked_fill_(padding[:, None, None], float("-inf"))
        return scores.softmax(-1) @ v

    def check(self, out, version):
        assert out.dtype == self.q.dtype
        assert out.shape == self.q.shape
        expected = self.expected()
        if self.q.dtype is torch.float32:
            torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
        elif version == "torch":  # rounds values, products and probabilities
            torch.testing.assert_close(out.double(), expected, rtol=0, atol=0.06)
        else:  # rounds once, at the end
            unit = torch.finfo(self.q.dtype).eps
            torch.testing.assert_close(out.double(), expected, rtol=0.51 * unit, atol=1e-5)


def attend(version):
    return attend_in_torch if version == "torch" else decode_attention


@relaxed
@given(
    form=FORMS,
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 4, 5, 7, 8, 11, 16]),
    pages=st.lists(st.integers(1, 150), min_size=1, max_size=4),
    unused=st.integers(0, 149),
    starts=st.one_of(st.none(), st.lists(st.integers(0, 599), min_size=3, max_size=3)),
)
def test_attention_is_that_over_the_values(
    version, form, dtype, rows, kv_heads, group, pages, unused, starts
):
    length = sum(pages) - min(unused, pages[-1] - 1)
    case = Case(form, dtype, rows, kv_heads, group, pages, length, starts)
    case.check(attend(version)(*case.arguments), version)


@settings(relaxed, max_examples=25)
@given(
    form=FORMS,
    rows=st.integers(1, 5),
    group=st.sampled_from([1, 3, 4]),
    page=st.sampled_from([64, 1000]),
    length=st.integers(600, 3000),
    starts=st.one_of(st.none(), st.lists(st.integers(0, 2999), min_size=5, max_size=5)),
    threads=st.integers(1, 5),
)
def test_long_caches_are_split_over_threads(variant, form, rows, group, page, length, starts, threads):
    torch.set_num_threads(threads)
    case = Case(form, torch.float32, rows, 2, group, [page] * -(-length // page), length, starts)
    case.check(decode_attention(*case.arguments), variant)


@pytest.mark.parametrize("bits", [4, 8])
def test_padding_is_never_read(variant, bits):
    case = Case(GroupwiseHeads(64, bits, 64), torch.float32, 3, 2, 4, [400, 400, 400], 900, [0, 3, 899])
    expected = decode_attention(*case.arguments)
    for k, v in case.pages[:2]:
        k[2] = v[2] = NO_NUMBER
    assert torch.equal(decode_attention(*case.arguments), expected)


@pytest.fixture
def last_bytes():
    """`last_bytes(n)`: uint8 (n,) that end where readable memory ends; a read beyond them ends the process."""
    memory = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    guard = ctypes.c_void_p(whole.data_ptr() + mmap.PAGESIZE), ctypes.c_size_t(mmap.PAGESIZE)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(*guard, 0) == 0
    yield lambda count: whole[mmap.PAGESIZE - count : mmap.PAGESIZE]
    libc.mprotect(*guard, mmap.PROT_READ | mmap.PROT_WRITE)


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect of Linux")
@pytest.mark.parametrize("bits", [4, 8])
def test_the_last_head_of_a_page_is_not_read_beyond(variant, bits, last_bytes):
    for dim, group in [(2, 2), (16, 16), (34, 34), (80, 80), (128, 64)]:
        form = GroupwiseHeads(dim, bits, group)
        case = Case(form, torch.float32, 1, 1, 1, [3], 3)
        keys, values = case.pages[0]
        keys = last_bytes(keys.numel()).view(keys.shape).copy_(keys)
        case.check(decode_attention(case.q, [(keys, values)], 3, None, Scoring(case.scale), form), variant)
        values = last_bytes(values.numel()).view(values.shape).copy_(values)
        decode_attention(case.q, [(case.pages[0][0], values)], 3, None, Scoring(case.scale), form)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_public_function_takes_encoded_pages(dtype, bits):
    case = Case(GroupwiseHeads(64, bits, 64), dtype, 2, 2, 2, [16, 16], 20, [0, 4])
    out = decode_attention(*case.arguments)
    torch.testing.assert_close(out.double(), case.expected(), rtol=0, atol=0.04)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, pages, form: (q[..., :32], pages, form), "the pages store heads of 64"),
        (lambda q, pages, form: (q, pages, None), "expected .* torch.float32"),
        (lambda q, pages, form: (q, pages, GroupwiseHeads(64, 8, 64)), r"expected \(1, 2, 4, 68\)"),
    ],
)
def test_pages_of_another_format_are_refused(change, message):
    case = Case(GroupwiseHeads(64, 4, 64), torch.float32, 1, 2, 2, [4], 4)
    q, pages, form = change(case.q, case.pages, case.form)
    with pytest.raises(ValueError, match=message):
        decode_attention(q, pages, 4, None, 1.0, form)


# The format


@relaxed
@given(
    form=FORMS,
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(0, 3),
    tokens=st.integers(1, 9),
    piece=st.sampled_from([1, 100, 1 << 22]),
    native=st.booleans(),
)
def test_values_come_back_within_half_a_step(form, dtype, rows, tokens, piece, native):
    form = replace(form, piece_values=piece)
    x = torch.randn(rows, 2, tokens, form.head_dim, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        if not native:
            patch.setattr(groupwise, "announce", lambda: False)
        stored = form.encode(x.transpose(1, 2).contiguous().transpose(1, 2))  # the strides of a layer's heads
        parts = list(form.decode(stored, tokens, torch.float32))
    assert stored.shape == (rows, 2, tokens, form.width)
    assert stored.dtype is torch.uint8 and stored.is_contiguous()
    assert all(part.is_contiguous() for part in parts)
    decoded = torch.cat(parts, dim=2)
    torch.testing.assert_close(decoded.double(), exact(stored, form), rtol=1e-6, atol=1e-6)
    groups = x.double().unflatten(-1, (-1, form.group))
    step = (groups.amax(-1) - groups.amin(-1)) / (2**form.bits - 1)
    # Half a step, and the rounding of scale and minimum to float16.
    error = (decoded.double().unflatten(-1, (-1, form.group)) - groups).abs()
    assert (error <= 0.51 * step[..., None] + 4e-3 * groups.abs().amax(-1, keepdim=True)).all()


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("dim", "group"), [(64, 64), (128, 64), (20, 20)])
def test_heads_of_a_small_span_are_kept(monkeypatch, dim, group, bits, native):
    if not native:
        monkeypatch.setattr(groupwise, "announce", lambda: False)
    form, unit = GroupwiseHeads(dim, bits, group), 2.0**-24
    spans = torch.tensor([3e-5, 1e-5, 7e-6, 2e-6, 9e-7, 3e-7])
    heads_of = spans[:, None] * torch.linspace(-0.3, 0.7, group).repeat(dim // group)
    x = heads_of[None, None].clone()  # one row of one head, a span for each token
    (out,) = form.decode(form.encode(x), len(spans), torch.float32)
    # Half a step, where a step is a whole number of units, and the rounding of the minimum.
    error, steps = (out - x).abs().amax((0, 1, 3)), spans / (2**bits - 1)
    assert (error <= (steps + unit) / 2 + 0.3 * spans * 2**-11 + unit).all()
    assert (error < spans / 4).all(), "the head is not lost"


def test_no_more_than_the_valid_tokens_is_decoded():
    form = GroupwiseHeads(16, 4, 16)
    stored = torch.full((1, 1, 8, form.width), NO_NUMBER, dtype=torch.uint8)
    stored[:, :, :3] = form.encode(torch.ones(1, 1, 3, 16))
    (part,) = form.decode(stored, 3, torch.float32)
    assert torch.equal(part, torch.ones(1, 1, 3, 16))


@pytest.mark.parametrize(
    ("dim", "bits", "group", "per_value"),
    [(64, 4, 64, 4.5), (128, 4, 64, 4.5), (80, 4, 80, 4.4), (64, 8, 64, 8.5), (128, 8, 64, 8.5)],
)
def test_bits_of_a_value(dim, bits, group, per_value):
    assert GroupwiseHeads(dim, bits, group).nbytes * 8 / dim == per_value


def test_plain_heads_are_left_alone():
    form, x = PlainHeads(8, torch.bfloat16), torch.randn(2, 3, 4, 8).bfloat16()
    assert form.encode(x) is x
    assert next(iter(form.decode(x, 1, torch.bfloat16))) is x
    assert (form.width, form.nbytes, form.workspace_bytes(6, 4)) == (8, 16, 0)
