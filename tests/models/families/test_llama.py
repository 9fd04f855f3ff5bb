"""Llama: grouped heads, biases, heads of any size and every rope, against transformers."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import LlamaConfig, MptConfig

from flexgen.errors import ModelError
from flexgen.models.families import config_from_dict, spec_from_config

LONGROPE = dict(rope_type="longrope", short_factor=[1.0, 1.5], long_factor=[2.0, 5.0], factor=4.0)
VARIANTS = {
    "one-to-one": dict(num_key_value_heads=8),
    "two-to-one": dict(num_key_value_heads=4),
    "eight-to-one": dict(num_key_value_heads=1),
    "biases": dict(attention_bias=True, mlp_bias=True),
    "tied": dict(tie_word_embeddings=True),
    "explicit-head-dim": dict(head_dim=10),
    "gelu": dict(hidden_act="gelu_pytorch_tanh"),
    "rope-theta": dict(rope_parameters=dict(rope_type="default", rope_theta=500.0)),
    "rope-linear": dict(rope_parameters=dict(rope_type="linear", factor=4.0)),
    # The sequence of 14 grows past 8: frequencies change at every token.
    "rope-dynamic": dict(max_position_embeddings=8, rope_parameters=dict(rope_type="dynamic", factor=2.0)),
    "rope-yarn": dict(
        rope_parameters=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=10)
    ),
    "rope-llama3": dict(
        rope_parameters=dict(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        )
    ),
    # Past the 8 positions of the config, and past the context of 8 that is the end of those below.
    "beyond-default": dict(max_position_embeddings=8),
    "rope-linear-extended": dict(
        max_position_embeddings=8, rope_parameters=dict(rope_type="linear", factor=4.0)
    ),
    "rope-yarn-extended": dict(max_position_embeddings=8, rope_parameters=dict(rope_type="yarn", factor=4.0)),
    "rope-dynamic-with-an-original": dict(
        max_position_embeddings=10,
        rope_parameters=dict(rope_type="dynamic", factor=2.0, original_max_position_embeddings=4),
    ),
    "rope-longrope-short": dict(rope_parameters=dict(**LONGROPE, original_max_position_embeddings=30)),
    "rope-longrope-switches": dict(rope_parameters=dict(**LONGROPE, original_max_position_embeddings=8)),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant, assert_equals_transformers):
    assert_equals_transformers("llama", **copy.deepcopy(VARIANTS[variant]))


def test_bfloat16_logits_are_close_to_transformers(assert_equals_transformers):
    # bfloat16 keeps 8 bits: logits of a few units differ by a few hundredths.
    assert_equals_transformers("llama", dtype=torch.bfloat16, atol=0.15)


def _config(**changes):
    sizes = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
    return LlamaConfig(**{**sizes, **changes})


def test_a_config_is_left_as_it_was():
    config = _config(rope_parameters=dict(rope_type="yarn", factor=4.0))
    before = copy.deepcopy(config.to_dict())
    spec_from_config(config, "mine")
    assert config.to_dict() == before


def test_rope_of_a_config_json_from_before_transformers_5():
    values = dict(model_type="llama", rope_theta=5000.0, rope_scaling={"type": "linear", "factor": 2.0})
    rope = spec_from_config(config_from_dict(values, "mine"), "mine").layers[0].attention.rope
    assert (rope.kind, rope.theta, rope.factor) == ("linear", 5000.0, 2.0)
    assert rope.inv_freq[0] == 0.5


@pytest.mark.parametrize(
    ("parameters", "context"),
    [
        (dict(rope_type="default"), 100),
        (dict(rope_type="linear", factor=4.0), 400),
        (dict(rope_type="dynamic", factor=2.5), 250),
        (dict(rope_type="yarn", factor=4.0), 400),
        (dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=50), 200),
        (dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=25), 100),
        (
            dict(
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=50,
            ),
            400,
        ),
        (
            dict(
                rope_type="longrope",
                short_factor=[1.0] * 4,
                long_factor=[2.0] * 4,
                original_max_position_embeddings=25,
            ),
            100,
        ),
    ],
    ids=lambda value: value["rope_type"] if isinstance(value, dict) else str(value),
)
def test_the_context_includes_the_scaling(parameters, context):
    config = _config(max_position_embeddings=100, rope_parameters=parameters)
    spec = spec_from_config(config, "mine")
    assert spec.max_positions == context
    assert spec.longest_text == math.inf


def test_several_stop_ids():
    assert spec_from_config(_config(eos_token_id=[5, 7]), "mine").eos_token_ids == (5, 7)
    assert spec_from_config(_config(eos_token_id=None), "mine").eos_token_ids == ()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "tanh"),
        ("sliding_window", 4096),
        ("attn_logit_softcapping", 30.0),
        ("partial_rotary_factor", 0.5),
        ("num_key_value_heads", 3),
        ("head_dim", 7),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("quantization_config", {"quant_method": "awq"}),
    ],
)
def test_unsupported_fields_are_refused(field, value):
    config = _config()
    setattr(config, field, value)
    with pytest.raises(ModelError, match=field):
        spec_from_config(config, "mine")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (dict(rope_type="unknown", rope_theta=1e4), "rope_type = 'unknown'.*supported: default"),
        (dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5), "partial_rotary_factor = 0.5"),
        (dict(rope_type="linear", rope_theta=1e4), "rope_parameters.*factor"),
        (dict(rope_type="linear", rope_theta=1e4, factor=0.0), "rope_parameters.*positive"),
        (dict(rope_type="linear", rope_theta=1e4, factor=1e308), "rope_parameters.*finite"),
        (dict(rope_type="linear", rope_theta=1e4, factor="4"), "rope_parameters"),
        (dict(rope_type="linear", rope_theta=[1e4], factor=2.0), "rope_parameters"),
        (dict(rope_type=["linear"], rope_theta=1e4), "rope_type = "),
        (
            dict(rope_type="yarn", rope_theta=1e4, factor=2.0, original_max_position_embeddings=0),
            "rope_parameters",
        ),
        (dict(rope_type="default", rope_theta=math.nan), "rope_parameters"),
        (
            dict(rope_type="longrope", rope_theta=1e4, factor=2.0, short_factor=[1.0], long_factor=[1.0]),
            "rope_parameters",
        ),
    ],
)
def test_rope_parameters_that_cannot_be_used_are_refused(parameters, message):
    config = _config()
    config.rope_parameters = parameters
    with pytest.raises(ModelError, match=message):
        spec_from_config(config, "mine")


def test_an_unknown_family_is_refused_with_the_known_ones():
    with pytest.raises(
        ModelError, match="model_type = 'mpt' is not supported; supported: .*, llama, .*, mistral, "
    ):
        spec_from_config(MptConfig(), "mine")
