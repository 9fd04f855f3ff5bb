"""Model families: one module each, whose name is the `model_type` of the configs that it reads.

A family is a function `to_spec(fields) -> ModelSpec`; what it computes is built of the layers that all families
share. A family is found by its file: nothing else lists it.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from flexgen.errors import ModelError, shown
from flexgen.models.fields import Fields, check_values, read_dtype
from flexgen.models.spec import ModelSpec

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedConfig


class Family(Protocol):
    """What a family's module offers."""

    def to_spec(self, fields: Fields) -> ModelSpec:
        """The spec of the config that `fields` reads, of the transformers class for the family's model_type.

        Raises ModelError for what the layers would not compute as the model's authors meant it. What it does not read
        is refused for it.
        """


_OF_CLASSIFIERS = ("num_labels", "id2label", "label2id")
"""Fields left out: transformers makes an entry for each label, of which a file can ask for any number."""


def known_families() -> list[str]:
    """Names of the modules in this folder, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def config_from_dict(values: dict[str, Any], name: str) -> PreTrainedConfig:
    """The transformers config of a config.json's contents. Raises ModelError."""
    from transformers import CONFIG_MAPPING  # takes seconds: only when a config is read

    model_type = values.get("model_type")
    _family(model_type, name)
    check_values(values, name)
    values = {field: value for field, value in values.items() if field not in _OF_CLASSIFIERS}
    for field in ("dtype", "torch_dtype"):  # the second was its name before transformers 5
        if field in values:
            values[field] = read_dtype(values[field], name)
    try:
        config: PreTrainedConfig = CONFIG_MAPPING[model_type].from_dict(values)
    except Exception as error:  # of whatever kind: transformers computes with values that come from a file
        raise ModelError(f"{name}: its config is not valid: {error}") from error
    return config


def spec_from_config(config: PreTrainedConfig, name: str) -> ModelSpec:
    """The spec of a transformers config. Raises ModelError, naming field, value and what is supported."""
    fields = Fields(config, name)
    spec = _family(config.model_type, name).to_spec(fields)
    fields.check_all_read()
    return spec


def _family(model_type: Any, name: str) -> Family:
    # As transformers names its modules: "xlm-roberta" is xlm_roberta.
    module = model_type.replace("-", "_") if isinstance(model_type, str) else None
    if module not in known_families():
        known = ", ".join(known_families())
        raise ModelError(f"{name}: model_type = {shown(model_type)} is not supported; supported: {known}")
    return cast(Family, import_module(f"{__name__}.{module}"))
