"""The text model of a multimodal checkpoint: its config, and its tensors.

The config of a multimodal model has the config of its text model in `text_config`. The files have the text model's
tensors with a prefix, next to those of vision and audio. The text model is opened as if it were alone.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedConfig

TEXT_CONFIG = "text_config"

_INHERITED = (
    "dtype", "eos_token_id", "bos_token_id", "pad_token_id", "quantization_config", "compression_config",
)  # fmt: skip
"""Fields that checkpoints have in either config. Where both have them, transformers uses the outer one."""

_PREFIX = re.compile(r"(?P<outer>model\.)?(?:language_model|text_model)\.")
_HEAD = "lm_head."
"""The start of the names of a head that is stored outside of the text model."""

Stored = TypeVar("Stored")


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the text model: `config` itself, or a copy of its text_config with the fields that it inherits.

    A head counts as tied if either config says so, because releases disagree. Files with a head of its own have the
    last word.
    """
    found = getattr(config, TEXT_CONFIG, None)
    if not hasattr(found, "model_type"):
        return config
    text: PreTrainedConfig = copy.deepcopy(found)
    for field in _INHERITED:
        if (value := getattr(config, field, None)) is not None:
            setattr(text, field, value)
    if getattr(config, "tie_word_embeddings", False):
        text.tie_word_embeddings = True
    return text


def text_tensors(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors of the text model by the names that it has alone; all of them if the files have only a text model.

    "model.language_model.norm.weight" is "model.norm.weight", "language_model.model.norm.weight" too.
    """
    matches = {name: _PREFIX.match(name) for name in tensors}
    if not any(matches.values()):
        return dict(tensors)
    found = {}
    for name, match in matches.items():
        if match:
            rest = name[match.end() :]
            inside = rest.startswith(("model.", _HEAD))
            found[rest if inside else f"{match['outer'] or ''}{rest}"] = tensors[name]
        elif name.startswith(_HEAD):
            found[name] = tensors[name]
    return found
