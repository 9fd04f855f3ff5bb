"""The codec `stored`: the kernel that it expects, and its estimates of time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from flexgen.formats import Encoding
from flexgen.formats.block_fp8 import BlockFP8
from flexgen.formats.fp4 import MXFP4, NVFP4
from flexgen.formats.integers import AWQ, GPTQ, PackedRows
from flexgen.kernels.loading import native_available
from flexgen.quant import Stored

BY_128 = BlockFP8(".weight_scale_inv", 128, 128)
SERVED = [MXFP4(), BY_128, GPTQ(4, 128, added=1)]
BY_24 = BlockFP8(".weight_scale_inv", 24, 24)


@pytest.mark.parametrize("encoding", SERVED, ids=lambda encoding: encoding.name)
def test_formats_that_the_kernel_of_the_cpu_knows(encoding: MXFP4) -> None:
    codec, dtype = Stored(encoding), torch.bfloat16
    assert codec.expected_fused_rows(True, dtype) > 0
    assert codec.certain_fused_rows(True, dtype) == native_available() * codec.expected_fused_rows(
        True, dtype
    )
    assert codec.expected_fused_rows(False, dtype) == codec.certain_fused_rows(False, dtype) == 0
    assert codec.expected_product(1, False) is None
    one, eight = (codec.expected_product(rows, True) for rows in (1, 8))
    assert one is not None and eight is not None
    assert encoding.form.code.bits / 8 <= one < eight < 8 * one, "a value is unpacked once"
    plain = 1e10
    decoding = codec.expected_decoding(plain, dtype, True)
    assert decoding is not None and one / plain < dtype.itemsize / decoding, "decoding takes longer"


def test_groups_that_the_kernel_does_not_know() -> None:
    codec = Stored(BY_24)
    assert codec.expected_fused_rows(True, torch.bfloat16) == 0
    assert codec.certain_fused_rows(True, torch.bfloat16) == 0
    assert codec.expected_product(1, True) is None


RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "packed_linear_published.json"
MEASURED: dict[str, Encoding] = {
    "fp8 (128 x 128)": BY_128,
    "mxfp4": MXFP4(),
    "nvfp4": NVFP4(".weight_packed", ".weight_global_scale", divides=True),
    "int4 pack-quantized": PackedRows(4, 128, symmetric=True),
    "int4 gptq": GPTQ(4, 128, added=1),
    "int4 awq": AWQ(128),
}


@pytest.mark.parametrize("name", MEASURED)
def test_expected_times_of_products_are_near_those_of_the_benchmark(name: str) -> None:
    """Within a third, for the numbers of rows that the kernel multiplies with the encoded matrix."""
    (measured,) = json.loads(RESULTS.read_text(encoding="utf-8"))["products"]
    out_size, in_size = measured["shape"]
    figures, codec = measured["figures"], Stored(MEASURED[name])
    most = codec.expected_fused_rows(True, getattr(torch, measured["dtype"]))
    compared = [rows for rows in (1, 8, 32, 64) if rows <= most]
    assert len(compared) >= 2
    for rows in compared:
        nbytes = codec.expected_product(rows, True)
        assert nbytes is not None
        expected = out_size * in_size * nbytes / figures["read"]["GB/s"]["median"] / 1e6
        assert expected / figures[f"{name}, {rows} rows"]["ms"]["median"] == pytest.approx(1, abs=0.34)
