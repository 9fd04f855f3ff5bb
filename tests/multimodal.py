"""Tiny multimodal models of transformers, whose text parts are tiny models of the families."""

from __future__ import annotations

import copy
from typing import Any

import torch
from tiny_families import TINY
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)

_VISION = dict(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
)  # fmt: skip
MULTIMODAL: dict[str, tuple[str, int]] = {
    "gemma3": ("gemma3_text", 0),
    "mistral3": ("ministral3", 0),
    "llava": ("llama", 0),
    "idefics3": ("llama", 1),
    "deepseek_vl": ("llama", 1),
    "exaone4_5": ("exaone4", 1),
}
"""The family and the number of the tiny config of each one's text part."""


def multimodal_config(model_type: str, family: str, number: int, **text: Any) -> PreTrainedConfig:
    """A multimodal config whose text part has the tiny config `number` of `family`, with the fields in `text`."""
    made = CONFIG_MAPPING[model_type]
    vision = getattr(made(), "vision_config", None)
    tokens = {field: 66 for field in ("image_token_id", "image_token_index") if hasattr(made(), field)}
    return made(
        text_config={**copy.deepcopy(TINY[family][number]), "model_type": family, **text},
        vision_config={
            "model_type": vision.model_type,
            **{field: value for field, value in _VISION.items() if field in vars(vision)},
        },
        **tokens,
    )


def multimodal_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model with random weights, such that every one of its text part matters to the logits."""
    torch.manual_seed(0)
    model = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]._from_config(
        config, attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.15)
            if parameter.ndim == 1 or "norm" in name:
                parameter.add_(0.5)
    model.tie_weights()
    model.generation_config.eos_token_id = None
    return model.eval()
