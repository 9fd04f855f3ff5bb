"""Reading a transformers config without passing over anything that the layers would compute wrongly."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from transformers import PreTrainedConfig

from flexgen.errors import ModelError
from flexgen.models.ops import ACTIVATIONS

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "compression_config": (None,),
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
"""Fields that change the computation, with the values that leave it as the layers do it."""


def check_neutral(config: PreTrainedConfig, name: str) -> None:
    """Raises ModelError for the first field of `_NEUTRAL` that asks for something the layers do not do."""
    for field, neutral in _NEUTRAL.items():
        require(config, name, field, neutral)
    layer_types = set(getattr(config, "layer_types", None) or ())
    if layer_types - {"full_attention"}:
        raise ModelError(
            f"{name}: layer_types = {sorted(layer_types)} is not supported; supported: full_attention"
        )


def require(config: PreTrainedConfig, name: str, field: str, supported: Collection[Any]) -> Any:
    """The value of `field` (None where it is absent), which must be one of `supported`. Raises ModelError."""
    value = getattr(config, field, None)
    if value not in supported:
        choices = ", ".join("absent" if choice is None else repr(choice) for choice in supported)
        raise ModelError(f"{name}: {field} = {value!r} is not supported; supported: {choices}")
    return value


def activation(config: PreTrainedConfig, name: str, field: str) -> str:
    """The name of the activation in `field`."""
    return str(require(config, name, field, sorted(ACTIVATIONS)))


def size(config: PreTrainedConfig, name: str, field: str) -> int:
    """The value of `field`. Raises ModelError unless it is an integer >= 1."""
    value = getattr(config, field, None)
    if not isinstance(value, int) or value < 1:
        raise ModelError(f"{name}: {field} = {value!r} is not a size; it must be an integer >= 1")
    return value


def multiple(name: str, field: str, value: int, of_field: str, of: int) -> None:
    """Raises ModelError unless `value` is a multiple of `of`."""
    if value % of:
        raise ModelError(f"{name}: {field} = {value} is not a multiple of {of_field} = {of}")


def dtype_of(config: PreTrainedConfig, name: str) -> torch.dtype:
    """The dtype of the weights; float32 where the config says nothing."""
    value = config.dtype
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    if dtype is None and value is None:
        return torch.float32
    supported = (torch.float32, torch.float16, torch.bfloat16)
    if dtype not in supported:
        names = ", ".join(str(choice).removeprefix("torch.") for choice in supported)
        raise ModelError(f"{name}: dtype = {value!r} is not supported; supported: {names}")
    return dtype


def eos_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """Stop ids of a config's `eos_token_id`: none, one or several."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)
