"""Model families. Each is one module, with the `model_type` of its configs as its name.

A family is a function `to_spec(fields) -> ModelSpec`. All families use the same layers. Families are found by their
files; there is no other list of them.
"""

from __future__ import annotations

import pkgutil
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from flexgen.errors import ModelError, shown
from flexgen.models.fields import Fields, check_values, read_dtype
from flexgen.models.spec import ModelSpec
from flexgen.models.text_part import TEXT_CONFIG, text_config

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedConfig


class Family(Protocol):
    """The interface of a family's module."""

    def to_spec(self, fields: Fields) -> ModelSpec:
        """The spec of the config in `fields`, an instance of the transformers class for the family's model_type.

        Raises ModelError for a field with a value that the layers do not support. Fields that it does not read must
        have their default values; `spec_from_config` checks that.
        """


_OF_CLASSIFIERS = ("num_labels", "id2label", "label2id")
"""Fields that are left out: transformers creates an entry for each label, and a file can ask for any number."""


def known_families() -> list[str]:
    """The names of the modules in this folder, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def about(family: str) -> str:
    """The models of a family in words: the first line of its module's docstring."""
    text = import_module(f"{__name__}.{family}").__doc__ or ""
    return text.partition("\n")[0].removesuffix(".")


def config_from_dict(values: dict[str, Any], name: str) -> PreTrainedConfig:
    """The transformers config for the contents of a config.json, which may be those of a multimodal model.

    Raises ModelError.
    """
    from transformers import CONFIG_MAPPING  # takes seconds to import, so only when a config is read

    model_type = values.get("model_type")
    known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
    if not (known and TEXT_CONFIG in CONFIG_MAPPING[model_type].sub_configs):
        _family(model_type, name)
    values = _checked(values, name)
    if isinstance(text := values.get(TEXT_CONFIG), dict):
        values[TEXT_CONFIG] = _checked(text, f"{name}, {TEXT_CONFIG}")
    try:
        config: PreTrainedConfig = CONFIG_MAPPING[model_type].from_dict(values)
    except Exception as error:  # transformers computes with values from the file, which can raise anything
        raise ModelError(f"{name}: the config is invalid: {error}") from error
    return config


def _checked(values: dict[str, Any], name: str) -> dict[str, Any]:
    """A copy of a config's values for its class. Raises ModelError for values on which the class would fail."""
    check_values(values, name)
    values = {field: value for field, value in values.items() if field not in _OF_CLASSIFIERS}
    for field in ("dtype", "torch_dtype"):  # torch_dtype was the name before transformers 5
        if field in values:
            values[field] = read_dtype(values[field], name)
    return values


def spec_from_config(config: PreTrainedConfig, name: str) -> ModelSpec:
    """The spec of a transformers config; for the config of a multimodal model, that of its text model.

    Raises ModelError with the field, its value and the supported values.
    """
    config = text_config(config)
    fields = Fields(config, name)
    spec = _family(config.model_type, name).to_spec(fields)
    fields.check_all_read()
    return replace(spec, encodings=fields.encodings())


def _family(model_type: Any, name: str) -> Family:
    # Modules are named like those of transformers: xlm_roberta for "xlm-roberta".
    module = model_type.replace("-", "_") if isinstance(model_type, str) else None
    if module not in known_families():
        known = ", ".join(known_families())
        raise ModelError(f"{name}: model_type = {shown(model_type)} is not supported; supported: {known}")
    return cast(Family, import_module(f"{__name__}.{module}"))
