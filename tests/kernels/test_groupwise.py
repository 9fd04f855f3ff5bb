"""Group-wise integers: as near as the bits allow, and the same bits from every version."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from flexgen.kernels import groupwise
from flexgen.kernels.groupwise import dequantise, quantise
from flexgen.kernels.packed import Packed
from flexgen.units import MIB

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCALES = [torch.float16, torch.bfloat16]

# The fixture is the same for all examples of a test.
relaxed = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def in_torch(monkeypatch):
    """Run a function of the module in torch, whatever is built."""

    def run(function, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(groupwise, "announce", lambda: False)
            return function(*arguments)

    return run


def values(shape, dtype, spread, offset, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread + offset
    return x.to(dtype)


cases = given(
    dtype=st.sampled_from(DTYPES),
    scale_dtype=st.sampled_from(SCALES),
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([2, 16, 30, 32, 34, 40, 64, 72, 80, 96, 100, 128]),
    groups=st.integers(1, 5),
    outer=st.lists(st.integers(1, 4), max_size=2),
    spread=st.sampled_from([0.0, 1e-8, 1e-6, 1e-5, 1e-3, 1e-2, 1.0, 300.0]),
    offset=st.sampled_from([0.0, -2.5, 0.1]),
)


@relaxed
@cases
def test_codes_are_the_nearest(
    version, in_torch, dtype, scale_dtype, bits, group, groups, outer, spread, offset
):
    x = values((*outer, groups * group), dtype, spread, offset)
    packed = (
        in_torch(quantise, x, bits, group, scale_dtype)
        if version == "torch"
        else quantise(x, bits, group, scale_dtype)
    )
    assert packed.shape == x.shape
    assert packed.values.nbytes * 8 == x.numel() * bits
    exact = torch.empty_like(x, dtype=torch.float32)
    in_torch(dequantise, packed, exact) if version == "torch" else dequantise(packed, exact)
    of_group = x.double().unflatten(-1, (-1, group))
    scale = packed.scales.double()[..., None]
    # Half a step, and what the rounding of scale and minimum to 8 or 11 bits shifts the ends of the range.
    unit = torch.finfo(scale_dtype).eps
    ends = of_group.abs().amax(-1, keepdim=True) * 2 * unit + torch.finfo(scale_dtype).tiny
    error = (exact.double().unflatten(-1, (-1, group)) - of_group).abs()
    assert (error <= 0.501 * scale + (2**bits - 1) * scale * unit + ends).all()


@relaxed
@cases
def test_every_version_gives_the_same_bits(
    variant, in_torch, dtype, scale_dtype, bits, group, groups, outer, spread, offset
):
    x = values((*outer, groups * group), dtype, spread, offset)
    packed, expected = quantise(x, bits, group, scale_dtype), in_torch(quantise, x, bits, group, scale_dtype)
    for name in ("values", "scales", "minimums"):
        assert torch.equal(getattr(packed, name), getattr(expected, name)), name
    for out_dtype in DTYPES:
        out, other = torch.empty_like(x, dtype=out_dtype), torch.empty_like(x, dtype=out_dtype)
        assert dequantise(packed, out) is out
        assert torch.equal(out, in_torch(dequantise, packed, other))


@pytest.mark.parametrize("bits", [4, 8])
def test_small_steps_are_rounded_up_to_units_of_float16(version, in_torch, bits):
    """Steps of k and k + 1/4 units: k is exact, and what is above it becomes k + 1, up to the normal numbers."""
    levels, unit = 2**bits - 1, 2.0**-24
    units = torch.cat((torch.arange(1, 1025), torch.arange(1024) + 0.25)).double()
    x = (units[:, None] * unit * torch.linspace(0, levels, 64, dtype=torch.float64)).float()
    packed = in_torch(quantise, x, bits) if version == "torch" else quantise(x, bits)
    assert torch.equal(packed.scales[:, 0].double() / unit, units.ceil())
    assert packed.minimums.eq(0).all()
    out = torch.empty_like(x)
    in_torch(dequantise, packed, out) if version == "torch" else dequantise(packed, out)
    assert ((out - x).abs().amax(-1) <= 0.5001 * units.ceil() * unit).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_large_tensors_are_split_over_threads(variant, in_torch, bits, threads):
    x = values((300, 64 * 33), torch.bfloat16, 0.02, 0.0)
    torch.set_num_threads(threads)
    packed, expected = quantise(x, bits), in_torch(quantise, x, bits)
    assert torch.equal(packed.values, expected.values)
    out, other = torch.empty_like(x), torch.empty_like(x)
    assert torch.equal(dequantise(packed, out), in_torch(dequantise, expected, other))


def test_all_codes_of_all_scales(variant, in_torch):
    """Every finite half as a scale and every code, so that no conversion is left out."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    scales = every[every.isfinite()]
    codes = torch.arange(256, dtype=torch.uint8).repeat(len(scales), 1)
    for minimums in (torch.zeros_like(scales), scales.flip(0)):
        packed = Packed(codes, scales[:, None], minimums[:, None].contiguous(), 8, 256)
        for dtype in DTYPES:
            out = torch.empty(codes.shape, dtype=dtype)
            other = in_torch(dequantise, packed, torch.empty_like(out))
            assert torch.equal(dequantise(packed, out), other), dtype


def test_four_bits_lie_in_halves_of_a_group():
    x = torch.arange(64.0) % 16
    packed = quantise(x, 4)
    assert packed.scales.item() == 1
    assert packed.minimums.item() == 0
    assert packed.values.tolist() == [low | (low << 4) for low in list(range(16)) * 2]


def test_a_constant_group_keeps_its_value(version, in_torch):
    x = torch.full((2, 64), 0.1).to(torch.float16)
    packed = in_torch(quantise, x, 4) if version == "torch" else quantise(x, 4)
    assert not packed.scales.any()
    assert torch.equal(dequantise(packed, torch.empty_like(x)), x)


def test_values_beyond_the_scale_type_are_clamped(version, in_torch):
    x = torch.linspace(-1e6, 1e6, 64)
    packed = in_torch(quantise, x, 8) if version == "torch" else quantise(x, 8)
    assert packed.minimums.item() == -65504
    assert packed.scales.isfinite().all()


def test_what_is_not_contiguous_works():
    x = values((64, 8), torch.float32, 1.0, 0.0).T
    packed = quantise(x, 8)
    assert torch.equal(packed.values, quantise(x.contiguous(), 8).values)
    out = torch.empty(64, 8).T
    assert torch.equal(dequantise(packed, out), dequantise(packed, torch.empty(8, 64)))


@pytest.mark.parametrize(
    ("x", "bits", "group", "scale_dtype", "message"),
    [
        (torch.ones(64), 3, 64, torch.float16, "3 bits: expected 4 or 8"),
        (torch.ones(66), 4, 33, torch.float16, "group 33: expected .* whole bytes"),
        (torch.ones(64), 4, 0, torch.float16, "group 0: expected"),
        (torch.ones(65), 4, 64, torch.float16, "not a multiple of the group, 64"),
        (torch.ones(64), 4, 64, torch.float32, "scales in torch.float32"),
    ],
)
def test_what_cannot_be_packed_is_refused(x, bits, group, scale_dtype, message):
    with pytest.raises(ValueError, match=message):
        quantise(x, bits, group, scale_dtype)


def test_an_output_that_does_not_fit_is_refused():
    packed = quantise(torch.ones(2, 64), 4)
    with pytest.raises(ValueError, match=r"out has shape \(64,\): expected \(2, 64\)"):
        dequantise(packed, torch.empty(64))
    short = Packed(packed.values[:1], packed.scales, packed.minimums, 4, 64)
    with pytest.raises(ValueError, match=r"expected uint8 of shape \(2, 32\)"):
        dequantise(short, torch.empty(2, 64))


def decoded_whole(packed, dtype):
    """Every value at once, in float32, as torch has it without pieces."""
    codes = packed.values.unflatten(-1, (-1, packed.group * packed.bits // 8))
    if packed.bits == 4:
        codes = torch.cat((codes & 15, codes >> 4), dim=-1)
    x = codes.float() * packed.scales.float()[..., None] + packed.minimums.float()[..., None]
    return x.flatten(-2).to(dtype)


@pytest.mark.parametrize("piece", [1, 64, 200, 1000, 1 << 19])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(640,), (1, 640), (7, 64), (5, 192), (2, 3, 4, 128), (0, 64), (3, 0)])
def test_torch_decodes_piece_by_piece_to_the_same_bits(piece, bits, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    packed = quantise(x, bits) if x.numel() else empty_packed(shape, bits)
    for dtype in DTYPES:
        wider = torch.full((*shape[:-1], shape[-1] + 8), 7.0, dtype=dtype)
        for out in (torch.empty(shape, dtype=dtype), wider[..., : shape[-1]]):
            assert groupwise.dequantise_in_torch(packed, out, piece) is out
            assert torch.equal(out, decoded_whole(packed, dtype))
        assert (wider[..., shape[-1] :] == 7.0).all()


def empty_packed(shape, bits):
    *outer, n = shape
    scales = torch.empty(*outer, n // 64, dtype=torch.float16)
    return Packed(torch.empty(*outer, n * bits // 8, dtype=torch.uint8), scales, scales, bits, 64)


class Sizes(TorchDispatchMode):
    """The bytes of the largest tensor that an operation makes, views of given memory apart."""

    def __init__(self, *given):
        super().__init__()
        self.largest, self._given = 0, {x.untyped_storage().data_ptr() for x in given}

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        made = function(*arguments, **(named or {}))
        for x in made if isinstance(made, (list, tuple)) else (made,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self._given:
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize("bits", [4, 8])
def test_torch_decodes_a_large_matrix_with_small_temporaries(bits):
    packed = quantise(torch.zeros(2048, 1024), bits)
    out = torch.empty(packed.shape, dtype=torch.float16)
    with Sizes(packed.values, packed.scales, packed.minimums, out) as sizes:
        groupwise.dequantise_in_torch(packed, out)
    assert 0 < sizes.largest <= 2 * MIB < out.nbytes
