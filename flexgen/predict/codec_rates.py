"""Rates of codecs on a machine: measured figures, or estimates of the codec from the machine's memory rate."""

from __future__ import annotations

from typing import Any

import torch

from flexgen.kernels.heads import HeadFormat
from flexgen.predict.hardware import Hardware
from flexgen.quant import MatrixCodec


def decoding_rate(hardware: Hardware, dtype: torch.dtype, codec: MatrixCodec[Any]) -> float:
    """The output bytes/s of decoding weights from `codec` to `dtype`. Raises HardwareError if it is unknown."""
    name = _name(dtype)
    if not hardware.decodes(name, codec.name) and (plain := hardware.device_attention.get(name)):
        expected = codec.expected_decoding(plain, dtype, hardware.topology.shares_host_memory)
        if expected is not None:
            return expected
    return hardware.decoding_rate(name, codec.name)


def fused_seconds(
    hardware: Hardware, dtype: torch.dtype, codec: MatrixCodec[Any], values: int, rows: float
) -> float | None:
    """The seconds of a product of `rows` rows with a matrix of `values` values in its encoded form, or None if the
    codec has no estimate."""
    plain = hardware.device_attention.get(_name(dtype))
    if plain is None:
        return None
    nbytes = codec.expected_product(rows, hardware.topology.shares_host_memory)
    return None if nbytes is None else values * nbytes / plain


def attention_rate(
    hardware: Hardware, dtype: torch.dtype, codec: str, heads: HeadFormat, on_device: bool
) -> float:
    """Bytes/s of cache at which the compute device or the host computes attention of new tokens.

    heads: the format of `codec`, which may be "none".

    Raises HardwareError if the rate is unknown.
    """
    table = "device_attention" if on_device else "host_attention"
    name = _name(dtype)
    key = name if codec == "none" else codec
    known = hardware.device_attention if on_device else hardware.host_attention
    if key not in known and (plain := known.get(name)):
        on_host = hardware.topology.shares_host_memory or not on_device
        if (expected := heads.expected_attention(plain, dtype, on_host)) is not None:
            return expected
    rate: float = hardware.figure(table, key)
    return rate


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
