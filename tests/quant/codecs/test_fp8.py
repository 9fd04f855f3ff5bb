"""fp8: values compared with e4m3 in float64, from its definition by bits; attention, lookups and costs."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from flexgen.errors import PolicyError
from flexgen.kernels.attention import decode_attention
from flexgen.kernels.linear import embedding, linear
from flexgen.kernels.scoring import Scoring
from flexgen.policy import Policy
from flexgen.predict.codec_rates import attention_rate, decoding_rate
from flexgen.predict.hardware import Hardware
from flexgen.quant import CODECS, head_format
from flexgen.quant.codecs import fp8

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CODEC = CODECS["fp8"]
NO_NUMBER = 255  # as a code, and four of them as a scale


def e4m3(codes: Tensor) -> Tensor:
    """Codes (uint8) as float64: sign, 4 bits of exponent, 3 of mantissa."""
    bits = codes.long()
    exponent, mantissa = bits >> 3 & 15, (bits & 7).double() / 8
    size = torch.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7).double())
    return torch.where(bits > 127, -size, size).masked_fill(bits & 127 == 127, math.nan)


NUMBERS = torch.tensor([code for code in range(256) if code & 127 != 127], dtype=torch.uint8)


def exact(encoded: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Codes and scales in float64, read byte by byte: the codes of all rows, then at a multiple of 64 the scales."""
    rows, width = shape
    begin = -(-rows * width // 64) * 64
    scales = encoded[begin : begin + 4 * rows].view(torch.float32).double()
    return e4m3(encoded[: rows * width]).view(shape), scales[:, None]


def random(rows: int, width: int, dtype: torch.dtype, spread: float = 0.0, size: float = 1.0) -> Tensor:
    """Values whose logarithms spread over `spread` powers of ten below `size`."""
    generator = torch.Generator().manual_seed(rows * 1000 + width)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    x *= size * 10 ** (-spread * torch.rand(rows, width, generator=generator, dtype=torch.float64))
    return x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)


def decoded(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    CODEC.decode(CODEC.encode(x), out)
    return out


SIZES = st.sampled_from([1e-45, 1e-40, 1e-37, 1e-7, 1e-3, 1.0, 3e4, 1e30, 3e38])


@given(
    rows=st.integers(1, 5),
    width=st.integers(1, 130),
    dtype=st.sampled_from(DTYPES),
    spread=st.sampled_from([0.0, 3.0, 8.0]),
    size=SIZES,
)
@example(2, 64, torch.float32, 0.0, 3e38)
@example(2, 64, torch.float16, 0.0, 3e4)
def test_values_come_back_within_the_rounding_of_e4m3(rows, width, dtype, spread, size):
    x = random(rows, width, dtype, spread, size)
    out = decoded(x)
    wide, found = x.double(), out.double()
    largest = wide.abs().amax(-1, keepdim=True)
    scale = (largest / 448).clamp_min(2.0**-126)
    # Half a unit of the mantissa, and below 2 ** -6 scales half a subnormal; the scale is rounded once, and the
    # result to its dtype.
    bound = torch.maximum(wide.abs() * 2.0**-4, scale * 2.0**-10)
    rounding = torch.finfo(dtype).eps * largest + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    error = (found - wide).abs()
    assert found.isfinite().all(), "no value leaves the range of its dtype"
    assert (error <= 1.001 * bound + rounding).all(), (error / bound).max()
    grown = (found.abs() > largest * (1 + torch.finfo(dtype).eps)).any(-1)
    assert not grown[scale[:, 0] > 2.0**-126].any(), "nothing grows beyond the largest, which is a code"
    assert (found * wide >= 0).all(), "no sign changes"


@given(rows=st.integers(1, 4), width=st.integers(1, 70), dtype=st.sampled_from(DTYPES), size=SIZES)
def test_each_value_gets_the_nearest_code(rows, width, dtype, size):
    x = random(rows, width, dtype, 4.0, size)
    codes, scales = exact(CODEC.encode(x), (rows, width))
    wanted = x.double() / scales
    nearest = (wanted[..., None] - e4m3(NUMBERS)).abs().amin(-1)
    # The quotient is rounded to float32 first, which can decide a tie.
    assert ((codes - wanted).abs() <= nearest * (1 + 1e-6) + wanted.abs() * 2.0**-24).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [2.0**-126, 3.3e-9, 0.7, 1.0, 141.0, 7.59e35])
@pytest.mark.parametrize("decode", [fp8.decode_by_bits, fp8.decode_by_type])
def test_every_code_is_its_number_rounded_once_or_twice(decode, scale, dtype):
    codes, scales = NUMBERS.repeat(3, 1), torch.tensor([scale, scale, 0.0])
    out = torch.empty(codes.shape, dtype=dtype)
    decode(codes, scales, out)
    # The product is a float32 first.
    expected = (e4m3(codes) * scales.double()[:, None]).to(torch.float32).to(dtype)
    assert torch.equal(out, expected)


def test_both_ways_to_decode_work_on_parts_and_on_slices():
    codes = NUMBERS.repeat(21, 2).view(3, 7, -1)[..., 2:-3]
    scales, outs = torch.rand(3, 7), []
    for decode in (
        fp8.decode_by_type,
        fp8.decode_by_bits,
        partial(fp8.decode_by_bits, piece=1),
        partial(fp8.decode_by_bits, piece=200),
    ):
        outs.append(torch.empty(codes.shape))
        decode(codes, scales, outs[-1])
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_a_row_of_zeros_stays_zero_and_the_largest_stays_the_largest():
    for dtype in DTYPES:
        x = torch.zeros(3, 40, dtype=dtype)
        x[1, 7], x[2, 3] = torch.finfo(dtype).max, -torch.finfo(dtype).max
        out = decoded(x)
        assert out[0].eq(0).all() and out[1:].count_nonzero() == 2
        torch.testing.assert_close(out, x, rtol=1e-2, atol=0)


def test_nan_does_not_become_a_number():
    x = torch.ones(2, 8)
    x[0, 3] = math.nan
    out = decoded(x)
    assert out[0].isnan().all() and out[1].eq(1).all()


@pytest.mark.parametrize("shape", [(4096, 4096), (3, 5), (1, 1), (50, 33)])
def test_bytes_are_a_code_for_each_value_and_a_scale_for_each_row(shape):
    rows, width = shape
    assert CODEC.nbytes(shape) <= rows * width + 4 * rows + 2 * 63
    assert CODEC.encode(torch.ones(shape)).shape == (CODEC.nbytes(shape),)
    (first, code_bytes), (begin, scale_bytes) = CODEC.rows(shape)
    assert (first, code_bytes, scale_bytes) == (0, width, 4) and begin % 64 == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_and_lookups_are_those_of_the_values_that_are_kept(dtype):
    weight, x = random(37, 90, dtype), random(5, 90, dtype)
    bias = random(1, 37, dtype)[0]
    encoded = CODEC.encode(weight)
    codes, scales = exact(encoded, (37, 90))
    made = []

    def decode() -> Tensor:
        made.append(torch.empty_like(weight))
        CODEC.decode(encoded, made[-1])
        return made[-1]

    matrix = CODEC.matrix(encoded, weight.shape, dtype, decode)
    unit = torch.finfo(dtype).eps
    expected = x.double() @ (codes * scales).T + bias.double()
    size = x.double().abs() @ (codes * scales).abs().T
    for out in (linear(x, matrix, bias), matrix.multiply(x, bias)):
        assert ((out.double() - expected).abs() <= unit * (size + expected.abs()) + 1e-5 * size).all()
    assert len(made) == 2 and matrix.fused_rows(dtype) == 0
    for ids in (torch.tensor([[4, 36, 0], [4, 4, 7]]), torch.empty(2, 0, dtype=torch.int64)):
        rows = embedding(ids, matrix)
        assert torch.equal(rows, torch.nn.functional.embedding(ids, made[0]))
    assert len(made) == 2, "a lookup decodes its rows only"


# The cache


def stored_values(stored: Tensor, head_dim: int) -> Tensor:
    """(..., head_dim) in float64: a head has its scale first."""
    scales = stored[..., :4].contiguous().view(torch.float32).double()
    return e4m3(stored[..., 4 : 4 + head_dim]) * scales


@given(
    head_dim=st.integers(1, 130),
    dtype=st.sampled_from([*DTYPES, torch.float64]),
    rows=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    group=st.sampled_from([1, 2, 5]),
    pages=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    unused=st.integers(0, 39),
    starts=st.one_of(st.none(), st.lists(st.integers(0, 119), min_size=3, max_size=3)),
)
def test_attention_is_that_over_the_values(head_dim, dtype, rows, kv_heads, group, pages, unused, starts):
    form, tokens = head_format("fp8", head_dim, dtype), sum(pages)
    length = tokens - min(unused, pages[-1] - 1)
    q = random(rows * kv_heads * group, head_dim, dtype).view(rows, kv_heads * group, 1, head_dim)
    k, v = (
        form.encode(
            random(rows * kv_heads * tokens, head_dim, dtype, spread).view(rows, kv_heads, tokens, head_dim)
        )
        for spread in (0.0, 1.0)
    )
    wide_k, wide_v = (
        stored_values(x[:, :, :length], head_dim).repeat_interleave(group, dim=1) for x in (k, v)
    )
    k[:, :, length:] = v[:, :, length:] = NO_NUMBER
    stored = [
        tuple(x.contiguous() for x in page) for page in zip(k.split(pages, 2), v.split(pages, 2), strict=True)
    ]
    begin = None if starts is None else torch.tensor([min(start, length - 1) for start in starts[:rows]])
    scale = head_dim**-0.5
    out = decode_attention(q, stored, length, begin, Scoring(scale), form)
    scores = q.double() @ wide_k.mT * scale
    if begin is not None:
        padding = torch.arange(length) < begin[:, None]
        scores.masked_fill_(padding[:, None, None], -math.inf)
    expected = scores.softmax(-1) @ wide_v
    # In half types values and probabilities are rounded as well.
    slack = 1e-5 if dtype in (torch.float32, torch.float64) else 0.08
    torch.testing.assert_close(out.double(), expected, rtol=slack, atol=slack)


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_are_encoded_independently(dtype):
    form, x = head_format("fp8", 21, dtype), random(2 * 3 * 9, 21, dtype, 2.0).view(2, 3, 9, 21)
    apart = x.transpose(1, 2).contiguous().transpose(1, 2)  # as a layer makes them
    whole = form.encode(x)
    assert whole.shape == (2, 3, 9, 28) and whole.dtype is torch.uint8
    form = replace(form, piece_values=100)
    assert torch.equal(form.encode(apart), whole)
    both = form.encode_both(x, x.flip(0))
    assert torch.equal(both[0], whole) and torch.equal(both[1], whole.flip(0))
    out = torch.cat(list(form.decode(whole, 9, dtype)), dim=2)
    assert torch.equal(out, decoded(x.reshape(-1, 21)).view(x.shape))
    assert torch.equal(form.whole(whole, 9, dtype), out)


def test_a_cache_of_half_the_bytes():
    assert head_format("fp8", 128, torch.bfloat16).nbytes == 132
    assert head_format("fp8", 80, torch.bfloat16).nbytes == 84


# What a policy and a prediction make of it


def test_a_policy_takes_it_wherever_a_codec_may_be(tmp_path):
    share = {"percent": 50, "codec": "fp8"}
    policy = Policy(weights={"cpu": 50, "disk": share}, cache={"gpu": 50, "cpu": share})
    policy.save(tmp_path / "policy.toml")
    assert Policy.load(tmp_path / "policy.toml") == policy
    with pytest.raises(PolicyError, match="attn_sparsity is 0.1 with codec 'fp8' for the cache on cpu"):
        policy.replace(attn_sparsity=0.1)
    with pytest.raises(PolicyError, match="activations: codec 'fp8' on cpu"):
        policy.replace(activations={"gpu": 50, "cpu": share})


@pytest.mark.parametrize("name", ["t4", "rtx-4090", "laptop-16g"])
def test_machines_without_figures_for_it_have_rates_of_their_memory(name):
    hardware = Hardware.preset(name)
    dtype = torch.float16 if "float16" in hardware.products else torch.float32
    plain = hardware.device_attention[str(dtype).removeprefix("torch.")]
    heads = head_format("fp8", 128, dtype)
    decoding, attention = (
        decoding_rate(hardware, dtype, CODEC),
        attention_rate(hardware, dtype, "fp8", heads, on_device=True),
    )
    assert 0 < decoding < plain and 0 < attention < plain
    if (
        "gpu" in hardware.capacity
    ):  # per value: read a byte of code, write two, read two, write two; then attention reads two
        assert decoding == pytest.approx(plain * 2 / 7)
        assert attention == pytest.approx(plain * 132 / (128 * 9))
