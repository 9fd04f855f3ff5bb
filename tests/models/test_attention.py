"""Parts of attention that no dense family has: sinks, and norms of queries and keys after the rotation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssRotaryEmbedding

from flexgen.kernels.rotation import token_factors
from flexgen.kernels.scoring import Scoring, Window
from flexgen.models import attention
from flexgen.models.attention import Attention
from flexgen.models.ops import causal_attention, rope_tables
from flexgen.models.rope import rope_spec
from flexgen.models.spec import (
    AttentionSpec,
    LayerNorms,
    LayerSpec,
    MLPSpec,
    ModelSpec,
    NormSpec,
    QKNormSpec,
    RopeSpec,
    ScoreSpec,
    ValueSpec,
)

HIDDEN, TOKENS = 32, 11
ROPE = rope_spec({"rope_theta": 150_000.0}, 8, 64)


class WholePrompt:
    """The context of a prompt without padding."""

    last_only = False
    text_length = None

    def __init__(self, tokens: int) -> None:
        self.positions = torch.arange(tokens)[None]

    def rope_factors(self, rope: RopeSpec, dtype: torch.dtype) -> Tensor:
        return token_factors(*rope_tables(rope, self.positions, dtype))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        return causal_attention(q, k, v, None, scoring)

    def keep_new(self, k: Tensor, v: Tensor) -> None:
        raise AssertionError("one chunk")

    def attend_chunk(self, *args: Any) -> Tensor:
        raise AssertionError("one chunk")


def layer_of(own: AttentionSpec) -> Attention:
    names = {name: (f"layers.{{i}}.{name}",) for name in ("q", "k", "v", "out", "sinks", "q_norm", "k_norm")}
    layer = LayerSpec(own, MLPSpec(8, "silu"), LayerNorms())
    spec = ModelSpec(
        name="mine", family="none", names=names, dtype=torch.float32, layers=(layer,), hidden_size=HIDDEN,
        vocab_size=8, max_positions=64, embed_size=HIDDEN, bos_token_id=None, pad_token_id=None,
        eos_token_ids=(), final_norm=None, tied_head=True,
    )  # fmt: skip
    return Attention(spec, 0)


@pytest.mark.parametrize("window", [None, 4])
def test_sinks_equal_transformers(window: int | None) -> None:
    kind = "full_attention" if window is None else "sliding_attention"
    config = GptOssConfig(
        hidden_size=HIDDEN, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_hidden_layers=1,
        sliding_window=window or 64, layer_types=[kind], attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": 150_000.0},
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = GptOssAttention(config, 0)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    layer = layer_of(
        AttentionSpec(
            4, 2, 8, qkv_bias=True, out_bias=True, rope=ROPE, scores=ScoreSpec(sinks=True),
            window=None if window is None else Window(window),
        )
    )  # fmt: skip
    stored = {name.replace("_proj", "").replace("o.", "out."): x for name, x in theirs.named_parameters()}
    weights = {weight.name: stored[weight.name].detach() for weight in layer.weights}
    assert layer.weights[-3].name == "sinks" and str(layer.weights[-3].sources[0]) == "layers.0.sinks"
    x, context = torch.randn(1, TOKENS, HIDDEN), WholePrompt(TOKENS)
    place = torch.arange(TOKENS)
    seen = (place <= place[:, None]) & (place > place[:, None] - (window or TOKENS))
    mask = torch.zeros(TOKENS, TOKENS).masked_fill(~seen, float("-inf"))[None, None]
    rotation = GptOssRotaryEmbedding(config)(x, context.positions)
    with torch.no_grad():
        expected = theirs(x, position_embeddings=rotation, attention_mask=mask)[0] + x
        found = layer.forward(x, weights, context)
        without = layer.forward(x, weights | {"sinks": torch.full((4,), -100.0)}, context)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - without).abs().max() > 0.01


@pytest.mark.parametrize("tokens", [1, TOKENS])
def test_a_norm_after_the_rotation(tokens: int) -> None:
    """Of one token and of many, against the same layer without a norm. The norm of Llama 4 has no weight."""
    norm = NormSpec("rms", 1e-6, weight=False)
    torch.manual_seed(0)
    plain, normed = (
        layer_of(AttentionSpec(4, 2, 8, rope=ROPE, qk_norm=form))
        for form in (None, QKNormSpec(norm, after_rope=True))
    )
    weights = {weight.name: torch.randn(weight.shape) for weight in plain.weights}
    assert [weight.name for weight in normed.weights] == [weight.name for weight in plain.weights]
    x, context = torch.randn(1, tokens, HIDDEN), WholePrompt(tokens)
    q, k, v = plain.qkv(x, weights, context)
    found = normed.qkv(x, weights, context)
    for made, expected in zip(found, (_rms(q), _rms(k), v), strict=True):
        torch.testing.assert_close(made, expected)


def test_queries_keys_and_values_are_multiplied_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    several, calls = attention.linears, []

    def counted(x: Tensor, weights: Any, biases: Any) -> list[Tensor]:
        calls.append(len(weights))
        return several(x, weights, biases)

    monkeypatch.setattr(attention, "linears", counted)
    layer = layer_of(AttentionSpec(4, 2, 8, rope=ROPE))
    weights = {weight.name: torch.randn(weight.shape) for weight in layer.weights}
    layer.qkv(torch.randn(1, 1, HIDDEN), weights, WholePrompt(1))
    assert calls == [3]


def _rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


@pytest.mark.parametrize("tokens", [1, TOKENS])
def test_values_that_are_the_keys_are_not_rotated(tokens: int) -> None:
    """In bfloat16, in which the compiled rotation overwrites the keys: like a projection with the same matrix."""
    torch.manual_seed(0)
    own, shared = (
        layer_of(AttentionSpec(4, 2, 8, rope=ROPE, values=ValueSpec(from_keys=same)))
        for same in (False, True)
    )
    weights = {weight.name: torch.randn(weight.shape).bfloat16() for weight in own.weights}
    weights["v.weight"] = weights["k.weight"]
    x = torch.randn(1, tokens, HIDDEN).bfloat16()
    results = [layer.forward(x, weights, WholePrompt(tokens)) for layer in (own, shared)]
    assert results[0].equal(results[1])
