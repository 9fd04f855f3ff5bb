"""Frequencies of every kind of RoPE are those of transformers, to the last bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from flexgen.models.fields import Fields
from flexgen.models.rope import KINDS

INIT = {"default": LlamaRotaryEmbedding.compute_default_rope_parameters, **ROPE_INIT_FUNCTIONS}

THETA = st.sampled_from([10_000, 10_000.0, 500_000.0, 1e6])
FACTOR = st.sampled_from([1, 1.0, 2, 2.5, 4.0, 8.0, 32.0])
LENGTHS = st.sampled_from([64, 100, 4096, 8192, 131_072])
HEAD_DIMS = st.sampled_from([4, 10, 64, 128])


def parameters_of(kind: str, dim: int) -> st.SearchStrategy[dict[str, Any]]:
    """Parameters of a kind as checkpoints have them, with and without those that have a default."""
    one_each = st.lists(st.floats(1.0, 50.0), min_size=dim // 2, max_size=dim // 2)
    own: dict[str, dict[str, Any]] = {
        "default": {},
        "linear": {},
        "dynamic": {},
        "yarn": {},
        "llama3": dict(low_freq_factor=st.sampled_from([1.0, 2]), high_freq_factor=st.sampled_from([4.0, 8])),
        "longrope": dict(short_factor=one_each, long_factor=one_each),
        "proportional": {},
    }
    optional: dict[str, dict[str, Any]] = {
        "yarn": dict(
            beta_fast=st.sampled_from([16.0, 32]), beta_slow=st.sampled_from([1.0, 2]), mscale=st.just(0.707),
            mscale_all_dim=st.just(1.0), attention_factor=st.just(1.25), truncate=st.booleans(),
        ),
        "longrope": dict(factor=FACTOR, attention_factor=st.just(1.19)),
        "proportional": dict(factor=FACTOR, partial_rotary_factor=st.sampled_from([0.25, 0.5, 0.3, 1.0])),
    }  # fmt: skip
    scaled = {} if kind in ("default", "longrope", "proportional") else dict(factor=FACTOR)
    scaled_from = kind in ("yarn", "llama3", "longrope")
    lengths = dict(original_max_position_embeddings=LENGTHS) if scaled_from else {}
    return st.fixed_dictionaries(
        dict(rope_type=st.just(kind), rope_theta=THETA, **scaled, **own[kind]),
        optional=optional.get(kind, {}) | lengths,
    )


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), dim=HEAD_DIMS, length=LENGTHS)
def test_frequencies_equal_transformers(kind: str, data: st.DataObject, dim: int, length: int) -> None:
    parameters = data.draw(parameters_of(kind, dim))
    sizes = dict(hidden_size=4 * dim, num_attention_heads=4, head_dim=dim, max_position_embeddings=length)
    config = LlamaConfig(**sizes, rope_parameters=copy.deepcopy(parameters))
    ours = Fields(config, "mine").rope(dim, partial=kind == "proportional")
    frequencies, scaling = INIT[kind](config)
    assert torch.equal(torch.tensor(ours.inv_freq), frequencies)
    assert ours.scaling == scaling
    if kind == "longrope":
        original = config.rope_parameters["original_max_position_embeddings"]
        frequencies, scaling = INIT[kind](config, seq_len=original + 1)
        assert torch.equal(torch.tensor(ours.long_inv_freq), frequencies) and ours.scaling == scaling
    else:
        assert ours.long_inv_freq == ()


def test_all_kinds_of_transformers_are_known() -> None:
    assert {*INIT} == {*KINDS}
