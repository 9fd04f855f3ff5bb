"""Model families by `model_type`. A family is one file of tables; its forward is the shared layers'.

Adding one: a file with `CONFIG_CLASS` and `to_spec(config, name) -> ModelSpec`, and its line in `FAMILIES`.
"""

from __future__ import annotations

from typing import Any, Protocol

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from flexgen.errors import ModelError
from flexgen.models.families import llama, opt
from flexgen.models.spec import ModelSpec


class Family(Protocol):
    """What a family's module offers."""

    @property
    def CONFIG_CLASS(self) -> type[PreTrainedConfig]:
        """The transformers class that reads its config.json."""

    def to_spec(self, config: Any, name: str) -> ModelSpec:
        """The spec of `config`. Raises ModelError for what would not be computed as its authors meant."""


FAMILIES: dict[str, Family] = {"opt": opt, "llama": llama}


def config_from_dict(values: dict[str, Any], name: str) -> PreTrainedConfig:
    """The transformers config of a config.json's contents. Raises ModelError."""
    family = _family(values.get("model_type"), name)
    try:
        return family.CONFIG_CLASS.from_dict(values)
    except (StrictDataclassError, TypeError, ValueError, KeyError) as error:
        raise ModelError(f"{name}: its config is not valid: {error}") from error


def spec_from_config(config: PreTrainedConfig, name: str) -> ModelSpec:
    """The spec of a transformers config. Raises ModelError, naming field, value and what is supported."""
    return _family(config.model_type, name).to_spec(config, name)


def _family(model_type: str | None, name: str) -> Family:
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ModelError(f"{name}: model_type = {model_type!r} is not supported; supported: {known}")
    return FAMILIES[model_type]
