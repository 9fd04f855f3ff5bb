"""Validation of transformers configs: every field that the layers do not support raises an error."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch

from flexgen.errors import ModelError, shown
from flexgen.models.ops import ACTIVATIONS
from flexgen.models.rope import KINDS, rope_spec
from flexgen.models.spec import RopeSpec

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedConfig

_LARGEST_SIZE = 2**31 - 1
_MOST = {"num_hidden_layers": 10_000, "head_dim": 65_536}
"""Limits of the fields that size objects and tables before any weight file is read."""
_DTYPES = {
    **dict.fromkeys(("float32", "float", "fp32"), torch.float32),
    **dict.fromkeys(("float16", "half", "fp16"), torch.float16),
    **dict.fromkeys(("bfloat16", "bf16"), torch.bfloat16),
}

_QUANTIZED = ("quantization_config", "compression_config")
"""Fields in which GPTQ, AWQ, bitsandbytes, fp8 and others describe their quantization."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "sliding_window": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "partial_rotary_factor": (None, 1.0),
    "embedding_multiplier": (None, 1.0),
    "attention_multiplier": (None,),
    "residual_multiplier": (None, 1.0),
    "logits_scaling": (None, 1.0),
    "num_local_experts": (None, 0, 1),
    "scale_embeddings": (None, False),
    "learned_embeddings": (None, True),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
}
"""Fields that change the computation, with the values that the layers support."""


def check_neutral(config: PreTrainedConfig, name: str) -> None:
    """Raises ModelError for the first field of `_NEUTRAL` with a value that the layers do not support."""
    for field in _QUANTIZED:
        check_unquantized(getattr(config, field, None), name, field)
    for field, neutral in _NEUTRAL.items():
        require(config, name, field, neutral)
    check_layer_types(getattr(config, "layer_types", None), name)


def check_values(values: Mapping[str, Any], name: str) -> None:
    """Check values on which transformers would fail without a useful message. Raises ModelError."""
    for field in _QUANTIZED:
        check_unquantized(values.get(field), name, field)
    check_layer_types(values.get("layer_types"), name)
    for field in ("vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers"):
        if field in values:
            check_size(values[field], name, field)


def check_layer_types(value: Any, name: str) -> None:
    """Raises ModelError unless all layers attend to all tokens."""
    kinds = () if value is None else value
    if not isinstance(kinds, list | tuple) or any(kind != "full_attention" for kind in kinds):
        raise ModelError(f"{name}: layer_types = {shown(value)} is not supported; supported: full_attention")


def check_unquantized(value: Any, name: str, field: str) -> None:
    """Raises ModelError unless `value`, of a field of `_QUANTIZED`, is None."""
    if value is None:
        return
    method = value.get("quant_method") if isinstance(value, dict) else value
    raise ModelError(
        f"{name}: the weights are quantized ({field}: {shown(method)}), which is not supported. Use a checkpoint in "
        "float16, bfloat16 or float32; a policy with the codec int4 or int8 quantizes it when it is opened"
    )


def require(config: PreTrainedConfig, name: str, field: str, supported: Collection[Any]) -> Any:
    """The value of `field` (None if it is absent). Raises ModelError unless it is one of `supported`."""
    value = getattr(config, field, None)
    if value not in supported:
        choices = ", ".join("absent" if choice is None else repr(choice) for choice in supported)
        raise ModelError(f"{name}: {field} = {shown(value)} is not supported; supported: {choices}")
    return value


def activation(config: PreTrainedConfig, name: str, field: str) -> str:
    """The name of the activation in `field`. Raises ModelError if it is not supported."""
    return str(require(config, name, field, sorted(ACTIVATIONS)))


def size(config: PreTrainedConfig, name: str, field: str) -> int:
    """The value of `field`. Raises ModelError unless it is an integer from 1 to the limit of the field."""
    return check_size(getattr(config, field, None), name, field)


def check_size(value: Any, name: str, field: str) -> int:
    """`value`, the value of `field`. Raises ModelError like `size`."""
    most = _MOST.get(field, _LARGEST_SIZE)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ModelError(
            f"{name}: {field} = {shown(value)} is not a size; it must be an integer from 1 to {most}"
        )
    return value


def number(config: PreTrainedConfig, name: str, field: str) -> float:
    """The value of `field`. Raises ModelError unless it is a finite number >= 0."""
    value = getattr(config, field, None)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise ModelError(f"{name}: {field} = {shown(value)} is not a finite number >= 0")
    return float(value)


def flag(config: PreTrainedConfig, name: str, field: str) -> bool:
    """The value of `field`. Raises ModelError unless it is true or false."""
    return bool(require(config, name, field, (True, False)))


def multiple(name: str, field: str, value: int, of_field: str, of: int) -> None:
    """Raises ModelError unless `value` is a multiple of `of`."""
    if value % of:
        raise ModelError(f"{name}: {field} = {value} is not a multiple of {of_field} = {of}")


def dtype_of(config: PreTrainedConfig, name: str) -> torch.dtype:
    """The dtype of the weights; float32 if the config has none. Raises ModelError."""
    dtype = read_dtype(config.dtype, name)
    return torch.float32 if dtype is None else dtype


def read_dtype(value: Any, name: str) -> torch.dtype | None:
    """The dtype named by `value`; None for None and "auto". Raises ModelError."""
    if value is None or value == "auto":
        return None
    text = str(value).removeprefix("torch.") if isinstance(value, str | torch.dtype) else ""
    if text not in _DTYPES:
        raise ModelError(
            f"{name}: dtype = {shown(value)} is not supported; supported: float32, float16, bfloat16, auto"
        )
    return _DTYPES[text]


def token_id(config: PreTrainedConfig, name: str, field: str) -> int | None:
    """The id in `field`; None if it is absent or not in the vocabulary.

    Raises ModelError if it is not an integer.
    """
    ids = token_ids(getattr(config, field, None), name, field, size(config, name, "vocab_size"))
    return ids[0] if ids else None


def token_ids(value: Any, name: str, field: str, vocab_size: int) -> tuple[int, ...]:
    """The ids in `value`: None, one id or a list. Ids outside of the vocabulary are left out.

    Raises ModelError for an id that is not an integer.
    """
    if value is None:
        return ()
    ids = tuple(value) if isinstance(value, list | tuple) else (value,)
    for each in ids:
        if not isinstance(each, int) or isinstance(each, bool):
            raise ModelError(f"{name}: {field} = {shown(value)} is not a token id; it must be an integer")
    return tuple(each for each in ids if 0 <= each < vocab_size)


def rope(config: PreTrainedConfig, name: str, head_dim: int) -> RopeSpec:
    """The RoPE for heads of `head_dim` values. Raises ModelError for invalid parameters."""
    config = copy.deepcopy(config)  # the parameters are completed in place below
    given = config.rope_parameters or {}
    if not isinstance(given, dict):
        raise ModelError(f"{name}: rope_parameters = {shown(given)} is not supported; expected an object")
    kind = given.get("rope_type", "default")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ModelError(f"{name}: rope_type = {shown(kind)} is not supported; supported: {', '.join(KINDS)}")
    if given.get("partial_rotary_factor") not in (None, 1.0):
        part = given["partial_rotary_factor"]
        raise ModelError(f"{name}: partial_rotary_factor = {shown(part)} is not supported; supported: 1.0")
    try:
        config.standardize_rope_params()  # adds lengths and theta from outside of the parameters
        return rope_spec(config.rope_parameters, head_dim, config.max_position_embeddings)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as error:
        parameters = config.rope_parameters
        raise ModelError(
            f"{name}: rope_parameters = {shown(parameters)} is invalid: {shown(error)}"
        ) from error
