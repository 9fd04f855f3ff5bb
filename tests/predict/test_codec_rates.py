"""Rates of codecs: a machine's own figures come first, then what the codec expects of the machine's memory."""

import pytest
import torch
from transformers import LlamaConfig

from flexgen.errors import HardwareError
from flexgen.formats.fp4 import MXFP4
from flexgen.layout.placement import place_weights
from flexgen.models import build_layers, open_model
from flexgen.policy import Share, Split
from flexgen.predict.arithmetic import Arithmetic
from flexgen.predict.codec_rates import attention_rate, decoding_rate, fused_seconds
from flexgen.predict.hardware import Hardware
from flexgen.quant import CODECS, Stored, head_format
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


def test_fused_products_take_the_time_that_the_codec_expects() -> None:
    hardware, codec = Hardware.preset("laptop-16g"), Stored(MXFP4())
    plain, dtype = hardware.device_attention["float32"], torch.float32
    for rows in (1, 8):
        expected = codec.expected_product(rows, on_host=True)
        assert expected is not None
        assert fused_seconds(hardware, dtype, codec, 1000, rows) == 1000 * expected / plain
    assert fused_seconds(hardware, dtype, CODECS["int4"], 1000, 1) is None
    assert fused_seconds(Hardware.preset("rtx-3090"), BF16, codec, 1000, 1) is None


def test_a_layer_with_stored_matrices_is_faster_than_one_that_decodes_them() -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4,
        quantization_config=dict(quant_method="fp8", weight_block_size=[128, 128]),
    )  # fmt: skip
    spec, _ = open_model(config, "dummy")
    layer = build_layers(spec)[1]
    hardware = Hardware.preset("laptop-16g")
    placement = place_weights([layer], Split(cpu=Share(100, codec="stored")), torch.float32)
    assert placement.stored
    fused = Arithmetic(placement, hardware)
    decoding = Arithmetic(placement, hardware.replace(products_decode=True))
    assert 2 * fused.products(layer, 1, 1, True) < decoding.products(layer, 1, 1, True)
    assert fused.products(layer, 1, 1, True) < fused.products(layer, 8, 1, True)
