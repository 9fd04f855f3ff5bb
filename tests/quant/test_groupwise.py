import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexgen.quant import CODECS, codec_for
from flexgen.quant.codec import ENCODING

NAMES = ["int4", "int8"]


@pytest.mark.parametrize(("name", "bits"), [("int4", 4.5), ("int8", 8.5)])
def test_bytes_match_the_theory(name, bits):
    shape = (4096, 4096)
    assert CODECS[name].nbytes(shape) * 8 == bits * 4096 * 4096


@given(
    name=st.sampled_from(NAMES),
    rows=st.integers(1, 5),
    groups=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_round_trip_is_within_half_a_step(name, rows, groups, dtype, seed):
    codec = CODECS[name]
    x = torch.randn(rows, 64 * groups, generator=torch.Generator().manual_seed(seed)).to(dtype)
    encoded = codec.encode(x)
    assert encoded.dtype is torch.uint8 and encoded.shape == (codec.nbytes(x.shape),)
    out = torch.empty_like(x)
    codec.decode(encoded, out)
    by_group = x.double().view(rows, groups, 64)
    step = (by_group.amax(-1) - by_group.amin(-1)) / (2 ** {"int4": 4, "int8": 8}[name] - 1)
    # Half a step, the rounding of scale and minimum to float16, and that of the result.
    slack = 2e-3 * by_group.abs().amax(-1) + torch.finfo(dtype).eps * by_group.abs().amax(-1)
    error = (out.double() - x.double()).abs().view(rows, groups, 64).amax(-1)
    assert (error <= step / 2 + slack).all()


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_groups_of_a_small_span_are_kept(name, native, monkeypatch):
    if not native:
        monkeypatch.setattr("flexgen.kernels.groupwise.announce", lambda: False)
    levels, unit = 2 ** {"int4": 4, "int8": 8}[name] - 1, 2.0**-24
    spans = torch.tensor([3e-4, 3e-5, 1e-5, 7e-6, 2e-6, 9e-7, 3e-7, 1e-7])
    x = spans[:, None] * torch.linspace(-0.3, 0.7, 64)
    x = torch.cat((x, torch.randn(8, 64, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 64)))
    out = torch.empty_like(x)
    CODECS[name].decode(CODECS[name].encode(x), out)
    # Half a step, where a step is a whole number of units, and the rounding of the minimum.
    error, steps = (out - x)[:8].abs().amax(-1), spans / levels
    assert (error <= (steps + unit) / 2 + 0.3 * spans * 2**-11 + unit).all()
    assert (error[:-2] < spans[:-2] / 4).all(), "the group is not lost"
    assert out[-1].eq(0).all()


def test_another_encoding_has_another_number():
    """Offload directories keep encoded weights: where this digest has to change, `ENCODING` has to change too."""
    x = (
        torch.linspace(-1, 1, 64) * 10.0 ** torch.arange(-8, 5)[:, None]
        + torch.linspace(0, 1e-3, 13)[:, None]
    )
    digest = hashlib.sha256(b"".join(CODECS[name].encode(x).numpy().tobytes() for name in NAMES))
    assert (ENCODING, digest.hexdigest()[:16]) == (1, "0def805379031645")


def test_encoding_decoded_values_again_changes_nothing():
    codec, x = CODECS["int8"], torch.randn(8, 128)
    once, twice = torch.empty_like(x), torch.empty_like(x)
    codec.decode(codec.encode(x), once)
    codec.decode(codec.encode(once), twice)
    torch.testing.assert_close(twice, once, atol=2e-3, rtol=0)


def test_extremes_and_constants():
    x = torch.stack([torch.zeros(64), torch.full((64,), -3.0), torch.linspace(-1e4, 1e4, 64)])
    out = torch.empty_like(x)
    CODECS["int4"].decode(CODECS["int4"].encode(x), out)
    assert out[0].eq(0).all() and out[1].eq(-3).all()
    assert out[2, 0] == pytest.approx(-1e4, rel=1e-3) and out[2, -1] == pytest.approx(1e4, rel=1e-3)


@pytest.mark.parametrize("shape", [(64,), (4, 63), (4, 96)])
def test_shapes_that_do_not_fit_are_kept_as_they_are(shape):
    assert codec_for("int4", shape) is None


def test_none_is_no_codec():
    assert codec_for("none", (64, 64)) is None
    assert codec_for("int4", (64, 64)) is CODECS["int4"]
