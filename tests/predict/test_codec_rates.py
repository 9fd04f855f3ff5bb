"""Rates of codecs: a machine's own figures come first, then what the codec expects of the machine's memory."""

import pytest
import torch

from flexgen.errors import HardwareError
from flexgen.predict.codec_rates import attention_rate, decoding_rate
from flexgen.predict.hardware import Hardware
from flexgen.quant import CODECS, head_format
from flexgen.quant.groupwise import Groupwise


class Expecting(Groupwise):
    """A codec that expects something of a machine."""

    def expected_decoding(self, plain, dtype, on_host):
        return plain / (5 if on_host else 3)


EXPECTING = Expecting("new", 8)
BF16 = torch.bfloat16


@pytest.mark.parametrize(("name", "share"), [("laptop-16g", 5), ("rtx-3090", 3)])
def test_what_a_codec_expects_holds_where_nothing_was_measured(name, share):
    hardware = Hardware.preset(name)
    dtype = torch.float32
    plain = hardware.device_attention["float32"]
    assert decoding_rate(hardware, dtype, EXPECTING) == plain / share
    measured = hardware.replace(decoding={**hardware.decoding, "new": 7e9})
    assert decoding_rate(measured, dtype, EXPECTING) == 7e9
    exact = hardware.replace(decoding={**hardware.decoding, "new": 7e9, "float32 new": 8e9})
    assert decoding_rate(exact, dtype, EXPECTING) == 8e9


def test_a_codec_that_expects_nothing_needs_a_figure():
    hardware = Hardware.preset("rtx-3090").replace(decoding={}, device_attention={"bfloat16": 1e12})
    heads = head_format("int4", 64, BF16)
    with pytest.raises(HardwareError, match=r"no figure decoding.int4"):
        decoding_rate(hardware, BF16, CODECS["int4"])
    with pytest.raises(HardwareError, match=r"no figure device_attention.int4"):
        attention_rate(hardware, BF16, "int4", heads, on_device=True)
    assert attention_rate(hardware, BF16, "none", head_format("none", 64, BF16), on_device=True) == 1e12


def test_a_dtype_without_a_figure_leaves_nothing_to_expect():
    hardware = Hardware.preset("t4")
    with pytest.raises(HardwareError, match=r"no figure decoding.new"):
        decoding_rate(hardware, BF16, EXPECTING)
