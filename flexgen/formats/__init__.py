"""Formats of quantized checkpoints. A config's quantization_config names the format and its settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flexgen.errors import ModelError, shown
from flexgen.formats import block_fp8, compressed_tensors, fp4, integers
from flexgen.formats.encoding import Encoding, Part, Settings

__all__ = ["METHODS", "Encoding", "Part", "instead", "read_encodings"]

METHODS: dict[str, Callable[[Settings], tuple[Encoding, ...]]] = {
    "awq": integers.read_awq,
    "compressed-tensors": compressed_tensors.read,
    "fp8": block_fp8.read,
    "gptq": integers.read_gptq,
    "modelopt": compressed_tensors.read_modelopt,
    "mxfp4": fp4.read_mxfp4,
}
"""The functions that read a config, by its quant_method."""


def read_encodings(value: Any, name: str, field: str) -> tuple[Encoding, ...]:
    """The encodings of quantized weights, from the value of a config's field; empty if the value is None.

    name: the name of the model. Raises ModelError for an unsupported quantization.
    """
    if value is None:
        return ()
    method = value.get("quant_method") if isinstance(value, dict) else value
    if not isinstance(value, dict) or method not in list(METHODS):
        raise ModelError(
            f"{name}: the weights are quantized ({field}: {shown(method)}), which is not supported. {instead()}"
        )
    return METHODS[method](Settings(value, f"{name}: {field}"))


def instead() -> str:
    """What to use in place of an unsupported quantized checkpoint."""
    return (
        "Use a checkpoint in float16, bfloat16 or float32, which the original model's repository usually has; a "
        "policy with the codec int4 or int8 quantizes it when it is opened. Or use a checkpoint in one of the "
        f"supported formats: {', '.join(METHODS)}"
    )
