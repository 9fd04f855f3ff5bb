"""Model families by `model_type`. A family is one file of tables; its forward is the shared layers'.

Adding one: a file with `CONFIG_CLASS` and `to_spec(config, name) -> ModelSpec`, and its line in `FAMILIES`.
"""

from __future__ import annotations

from typing import Any, Protocol

from transformers import PreTrainedConfig

from flexgen.errors import ModelError
from flexgen.models.families import fields, llama, opt
from flexgen.models.spec import ModelSpec
from flexgen.shown import shown


class Family(Protocol):
    """What a family's module offers."""

    @property
    def CONFIG_CLASS(self) -> type[PreTrainedConfig]:
        """The transformers class that reads its config.json."""

    def to_spec(self, config: Any, name: str) -> ModelSpec:
        """The spec of `config`. Raises ModelError for what would not be computed as its authors meant."""


_OF_CLASSIFIERS = ("num_labels", "id2label", "label2id")
"""Fields left out: transformers makes an entry for each label, of which a file can ask for any number."""

FAMILIES: dict[str, Family] = {"opt": opt, "llama": llama}


def config_from_dict(values: dict[str, Any], name: str) -> PreTrainedConfig:
    """The transformers config of a config.json's contents. Raises ModelError."""
    family = _family(values.get("model_type"), name)
    fields.check_values(values, name)
    values = {field: value for field, value in values.items() if field not in _OF_CLASSIFIERS}
    for field in ("dtype", "torch_dtype"):  # the second was its name before transformers 5
        if field in values:
            values[field] = fields.read_dtype(values[field], name)
    try:
        return family.CONFIG_CLASS.from_dict(values)
    except Exception as error:  # of whatever kind: transformers computes with values that come from a file
        raise ModelError(f"{name}: its config is not valid: {error}") from error


def spec_from_config(config: PreTrainedConfig, name: str) -> ModelSpec:
    """The spec of a transformers config. Raises ModelError, naming field, value and what is supported."""
    return _family(config.model_type, name).to_spec(config, name)


def _family(model_type: Any, name: str) -> Family:
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ModelError(f"{name}: model_type = {shown(model_type)} is not supported; supported: {known}")
    return FAMILIES[model_type]
