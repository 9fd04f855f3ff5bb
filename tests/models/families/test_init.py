"""A family is a module with the name of its model_type. A file in the folder is enough to add one."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_families import TINY
from transformers import CONFIG_MAPPING, PreTrainedConfig

from flexgen.errors import ModelError
from flexgen.models import build_layers, families, open_model
from flexgen.models.families import config_from_dict, known_families, spec_from_config


def test_every_family_is_a_model_type_of_transformers() -> None:
    for name in known_families():
        assert name in CONFIG_MAPPING


def test_every_family_names_all_of_its_modules() -> None:
    for name in known_families():
        spec, _ = open_model(CONFIG_MAPPING[name](**TINY[name][0]), "dummy")
        layers = build_layers(spec.first_layers(1))
        assert all(weight.sources for layer in layers for weight in layer.weights)
        assert spec.family == name


def test_a_file_in_the_folder_is_a_family(uneven: Any) -> None:
    assert known_families() == [*sorted(TINY), "uneven"]
    spec, _ = open_model(uneven.UnevenConfig(("wide", "narrow")), "dummy")
    assert spec.family == "uneven" and spec.layers == (uneven.WIDE, uneven.NARROW)


def test_without_it_the_model_type_is_refused_with_those_that_are_known(uneven: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "__path__", families.__path__[:1])
        with pytest.raises(
            ModelError,
            match="model_type = 'uneven' is not supported; supported: afmoe, arcee, .*, starcoder2$",
        ):
            spec_from_config(uneven.UnevenConfig(), "mine")


@pytest.mark.parametrize(
    "model_type",
    [None, "", 7, ["opt"], "fields", "__init__", "..spec", "opt.SIZES", "OPT", "Llama", "lla-ma"],
)
def test_an_unknown_family_is_refused(model_type: Any) -> None:
    with pytest.raises(
        ModelError, match="model_type = .* is not supported; supported: afmoe, arcee, .*, opt"
    ):
        config_from_dict({"model_type": model_type}, "mine")


def test_a_hyphen_is_written_as_an_underscore(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in transformers' own modules: "gpt-sw3" is gpt_sw3."""
    (tmp_path / "made_up.py").write_text(
        "def to_spec(fields):\n    return fields.name, fields.get('model_type')\n"
    )
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])

    class MadeUp(PreTrainedConfig):
        model_type = "made-up"

    assert spec_from_config(MadeUp(), "mine") == ("mine", "made-up")
