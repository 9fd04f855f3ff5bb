"""The codec `stored`: the kernel that it expects, and its estimates of time."""

from __future__ import annotations

import pytest
import torch

from flexgen.formats.block_fp8 import BlockFP8
from flexgen.formats.fp4 import MXFP4
from flexgen.formats.integers import GPTQ
from flexgen.kernels.loading import native_available
from flexgen.quant import Stored

SERVED = [MXFP4(), BlockFP8(".weight_scale_inv", 128, 128), GPTQ(4, 128, added=1)]
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
