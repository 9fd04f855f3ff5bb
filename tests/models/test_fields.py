"""Arbitrary values in the fields of a config.json."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from tiny_families import TINY
from transformers import CONFIG_MAPPING
from transformers.utils.logging import warning_once

from flexgen.errors import CheckpointError, ModelError
from flexgen.models import ModelSpec, open_model
from flexgen.models.families import config_from_dict, spec_from_config

LLAMA = dict(
    model_type="llama", vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=4, intermediate_size=48, max_position_embeddings=40, pad_token_id=0,
)  # fmt: skip
OPT = dict(
    model_type="opt", vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48,
    max_position_embeddings=40, word_embed_proj_dim=32,
)  # fmt: skip
DEEP: Any = []
for _ in range(5000):
    DEEP = [DEEP]


def _spec(values: dict[str, Any], **changes: Any) -> ModelSpec:
    return spec_from_config(config_from_dict({**values, **changes}, "mine"), "mine")


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        ("torch.float16", torch.float16),
        ("fp16", torch.float16),
        ("half", torch.float16),
        ("bf16", torch.bfloat16),
        ("torch.bfloat16", torch.bfloat16),
        ("fp32", torch.float32),
        (None, torch.float32),
        ("auto", torch.float32),
    ],
)
def test_names_of_dtypes(field, value, dtype):
    assert _spec(LLAMA, **{field: value}).dtype == dtype


@pytest.mark.parametrize("value", ["auto", None])
def test_a_dtype_that_is_not_stated_is_that_of_the_files(value, make_model, save):
    config = save(make_model("llama", dtype=torch.bfloat16)) / "config.json"
    values = json.loads(config.read_text()) | {"dtype": value}
    config.write_text(json.dumps(values))
    assert open_model(config.parent)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("values", [LLAMA, OPT], ids=["llama", "opt"])
def test_ids_outside_the_vocabulary_count_as_none(values):
    for field in ("pad_token_id", "bos_token_id"):
        assert getattr(_spec(values, **{field: 63}), field) == 63
        for outside in (-1, 64, 10**30):
            assert getattr(_spec(values, **{field: outside}), field) is None
    assert _spec(values, eos_token_id=[2, 64, -1, 5]).eos_token_ids == (2, 5)
    assert _spec(values, eos_token_id=-1).eos_token_ids == ()


def test_stop_ids_of_a_generation_config(make_model, save):
    directory = save(make_model("llama"))
    file = directory / "generation_config.json"
    file.write_text('{"eos_token_id": [3, 64]}')
    assert open_model(directory)[0].eos_token_ids == (3,)
    file.write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ModelError, match=r"generation_config.json: eos_token_id = '</s>' is not a token id"):
        open_model(directory)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dtype", "int8"),
        ("dtype", 16),
        ("torch_dtype", {"a": "float16"}),
        ("eos_token_id", "</s>"),
        ("eos_token_id", [2, "x"]),
        ("num_attention_heads", 0),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", True),
        ("head_dim", 10**9),
        ("vocab_size", 10**30),
        ("vocab_size", 10**5000),
        ("rms_norm_eps", math.nan),
        ("rms_norm_eps", math.inf),
        ("layer_types", 5),
        ("layer_types", [[1], "full_attention"]),
        ("rope_parameters", 5),
        ("rope_parameters", [1]),
        ("model_type", ["llama"]),
        ("model_type", {"a": 1}),
        ("model_type", DEEP),
        ("model_type", 10**5000),
        ("quantization_config", DEEP),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_values_that_are_refused_by_name(field, value):
    with pytest.raises(ModelError, match=f"mine: .*({field}|{field.removeprefix('torch_')})") as raised:
        _spec(LLAMA, **{field: value})
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize(
    "field", [*LLAMA, "rms_norm_eps", "hidden_act", "attention_bias", "mlp_bias", "head_dim"]
)
@pytest.mark.parametrize("value", ["", -1, 1.5, [], {}, [[1]], math.nan, "2"], ids=repr)
def test_no_value_ends_in_another_error(field, value):
    try:
        _spec(LLAMA, **{field: value})
    except ModelError as error:
        assert "mine: " in str(error)


@pytest.mark.parametrize("field", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("method", ["bitsandbytes", "hqq", "quanto", "torchao", "aqlm", None, 3, ["fp8"]])
def test_quantized_checkpoints_name_their_method_and_the_fix(field, method):
    with pytest.raises(
        ModelError,
        match=rf"{field}: .*{repr(method).strip('[]')}.*checkpoint in float16.*int4 or int8.*formats: awq,",
    ):
        _spec(LLAMA, **{field: {"quant_method": method, "bits": 4}})


def test_labels_of_a_classifier_are_not_made():
    assert _spec(LLAMA, num_labels=10**9).num_layers == 2


def test_more_layers_than_tensors_are_refused_when_the_files_are_opened(make_model, save):
    config = save(make_model("opt")) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 9999}))
    with pytest.raises(CheckpointError, match="has 9999 layers, but the files contain only [0-9]+ tensors"):
        open_model(config.parent)


def test_no_warning_of_transformers_about_the_defaults_of_a_class(caplog: pytest.LogCaptureFixture) -> None:
    """The class of StarCoder2 has stop ids outside of its vocabulary by default."""
    config = CONFIG_MAPPING["starcoder2"](**TINY["starcoder2"][0])
    warning_once.cache_clear()
    spec_from_config(config, "mine")
    assert not caplog.records
    warning_once.cache_clear()
    type(config)()
    assert "within the vocabulary" in caplog.text, "without this, the test proves nothing"
