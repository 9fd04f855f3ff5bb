"""OPT in all its variants, against transformers, and by name."""

from __future__ import annotations

import pytest
import torch
from transformers import OPTConfig

from flexgen.errors import ModelError
from flexgen.models import build_layers, open_model
from flexgen.models.families import opt, spec_from_config
from flexgen.models.known import known_name

VARIANTS = {
    "plain": {},
    "gelu": dict(activation_function="gelu"),
    "post-norm": dict(do_layer_norm_before=False),
    "projected": dict(word_embed_proj_dim=24),
    "like-350m": dict(word_embed_proj_dim=24, do_layer_norm_before=False),
    "no-final-norm": dict(_remove_final_layer_norm=True),
    "no-affine": dict(layer_norm_elementwise_affine=False),
    "no-bias": dict(enable_bias=False),
    "like-galactica": dict(
        enable_bias=False, layer_norm_elementwise_affine=False, activation_function="gelu"
    ),
    "untied": dict(tie_word_embeddings=False),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant, assert_equals_transformers):
    assert_equals_transformers("opt", **VARIANTS[variant])


def test_bfloat16_logits_are_close_to_transformers(assert_equals_transformers):
    # bfloat16 keeps 8 bits: logits of a few units differ by a few hundredths.
    assert_equals_transformers("opt", dtype=torch.bfloat16, atol=0.15)


# Parameters as published, in billions; 350m counts its projections.
PARAMETERS = {
    "opt-125m": 0.125, "opt-350m": 0.331, "opt-1.3b": 1.316, "opt-2.7b": 2.652, "opt-6.7b": 6.658,
    "opt-13b": 12.853, "opt-30b": 29.975, "opt-66b": 65.718, "opt-175b": 174.604,
}  # fmt: skip


@pytest.mark.parametrize("size", opt.SIZES)
def test_known_sizes_have_the_published_number_of_parameters(size):
    for name in (size, f"facebook/{size}", size.upper()):
        spec, checkpoint = open_model(name, "dummy")
        assert checkpoint.directory is None
        assert (spec.name, spec.vocab_size, spec.max_positions) == (size, 50272, 2048)
        unique = {w.key: w.numel for layer in build_layers(spec) for w in layer.weights}
        assert sum(unique.values()) / 1e9 == pytest.approx(PARAMETERS[size], rel=0.005)
    assert known_name("opt-31b") is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("activation_function", "tanh"),
        ("sliding_window", 64),
        ("scale_embeddings", True),
        ("learned_embeddings", False),
        ("num_hidden_layers", 0),
        ("num_attention_heads", 5),
        ("dtype", "float8_e4m3fn"),
    ],
)
def test_unsupported_fields_are_refused(field, value):
    config = OPTConfig(hidden_size=32, ffn_dim=64, num_attention_heads=4)
    setattr(config, field, value)
    with pytest.raises(ModelError, match=field) as raised:
        spec_from_config(config, "mine")
    assert "mine" in str(raised.value)
    assert str(value) in str(raised.value)
