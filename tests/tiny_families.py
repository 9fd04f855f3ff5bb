"""Tiny configs of every family, which together use all branches of its table.

They have grouped heads, a vocabulary that is no power of two, and heads that do not add up to the hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

_SIZES: dict[str, Any] = dict(
    vocab_size=67, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=40, max_position_embeddings=40, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
_WIDE = _SIZES | dict(head_dim=12)
_GPT: dict[str, Any] = dict(
    vocab_size=67, n_embd=32, n_layer=3, n_head=4, n_positions=40, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
_OPT: dict[str, Any] = dict(
    vocab_size=67, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, ffn_dim=40, max_position_embeddings=40,
    word_embed_proj_dim=32,
)  # fmt: skip
_BLOOM: dict[str, Any] = dict(vocab_size=67, hidden_size=36, n_layer=3, n_head=6, pad_token_id=0)
_NEOX = {field: value for field, value in _SIZES.items() if field != "num_key_value_heads"}
_FALCON = {field: value for field, value in _NEOX.items() if field != "intermediate_size"}
_KINDS = ["sliding_attention", "full_attention", "sliding_attention"]


def _partial(share: float, **others: Any) -> dict[str, Any]:
    return dict(
        rope_parameters=dict(rope_type="default", rope_theta=500.0, partial_rotary_factor=share, **others)
    )


_YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=10)
_LONG = dict(
    original_max_position_embeddings=8,
    rope_parameters=dict(
        rope_type="longrope", rope_theta=1e4, partial_rotary_factor=0.5,
        short_factor=[1.0, 1.5], long_factor=[2.0, 5.0],
    ),
)  # fmt: skip

TINY: dict[str, list[dict[str, Any]]] = {
    "arcee": [_WIDE, _WIDE | dict(attention_bias=True, mlp_bias=True)],
    "bloom": [_BLOOM, _BLOOM | dict(n_head=2)],
    "codegen": [_GPT | dict(rotary_dim=4)],
    "cohere": [
        _SIZES | dict(logit_scale=0.3),
        _SIZES | dict(use_qk_norm=True, attention_bias=True, logit_scale=2.0),
    ],
    "cohere2": [_SIZES | dict(layer_types=_KINDS, sliding_window=5, logit_scale=0.3)],
    "ernie4_5": [_WIDE, _WIDE | dict(use_bias=True, tie_word_embeddings=False)],
    "exaone4": [
        _SIZES | dict(sliding_window=None, layer_types=["full_attention"] * 3),
        _SIZES | dict(sliding_window=4, layer_types=_KINDS),
    ],
    "falcon": [
        _FALCON | dict(new_decoder_architecture=True, num_kv_heads=2),
        _FALCON | dict(new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1, bias=True),
        _FALCON | dict(multi_query=True, parallel_attn=True),
        _FALCON | dict(multi_query=False, parallel_attn=False, bias=True, tie_word_embeddings=False),
        _FALCON | dict(multi_query=False, parallel_attn=False, bias=True, alibi=True),
    ],
    "gemma": [_WIDE],
    "gemma2": [
        _WIDE
        | dict(
            layer_types=_KINDS,
            sliding_window=4,
            query_pre_attn_scalar=7,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
        ),
        _WIDE | dict(sliding_window=6, attn_logit_softcapping=None, attention_bias=True),
    ],
    "gemma3_text": [
        _WIDE
        | dict(
            layer_types=_KINDS,
            sliding_window=4,
            query_pre_attn_scalar=7,
            rope_parameters=dict(
                full_attention=dict(rope_type="linear", rope_theta=1e4, factor=8.0),
                sliding_attention=dict(rope_type="default", rope_theta=500.0),
            ),
        ),
        _WIDE | dict(sliding_window=5, final_logit_softcapping=2.0),
    ],
    "glm": [_WIDE],
    "glm4": [_WIDE | dict(attention_bias=False), _WIDE],
    "gpt2": [_GPT, _GPT | dict(scale_attn_by_inverse_layer_idx=True, n_inner=48)],
    "gpt_bigcode": [_GPT, _GPT | dict(multi_query=False)],
    "gpt_neox": [_NEOX | _partial(0.5), _NEOX | dict(use_parallel_residual=False, attention_bias=False)],
    "gptj": [_GPT | dict(rotary_dim=4), _GPT | dict(rotary_dim=8)],
    "granite": [
        _SIZES
        | dict(
            embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.5, logits_scaling=4.0
        ),
        _SIZES | dict(attention_bias=True, mlp_bias=True),
    ],
    "llama": [_WIDE | dict(rope_parameters=_YARN), _SIZES | dict(attention_bias=True, mlp_bias=True)],
    "ministral3": [
        _WIDE | dict(rope_parameters=_YARN | dict(llama_4_scaling_beta=0.5)),
        _WIDE | dict(rope_parameters=_YARN | dict(llama_4_scaling_beta=0.5), sliding_window=6),
    ],
    "mistral": [_WIDE | dict(sliding_window=None), _SIZES | dict(sliding_window=5)],
    "nemotron": [_WIDE | dict(attention_bias=True, mlp_bias=True), _WIDE],
    "olmo2": [_SIZES, _SIZES | dict(attention_bias=True)],
    "olmo3": [
        _SIZES | dict(layer_types=["full_attention"] * 3),
        _SIZES
        | dict(
            layer_types=_KINDS,
            sliding_window=6,
            rope_parameters=dict(
                full_attention=_YARN,
                sliding_attention=dict(rope_type="default", rope_theta=500.0),
            ),
        ),
    ],
    "opt": [_OPT, _OPT | dict(do_layer_norm_before=False, word_embed_proj_dim=24)],
    "phi": [_SIZES, _SIZES | dict(qk_layernorm=True) | _partial(0.25)],
    "phi3": [_SIZES, _SIZES | _partial(0.75), _SIZES | _LONG | dict(sliding_window=7)],
    "qwen2": [
        _SIZES,
        _SIZES | dict(tie_word_embeddings=True) | dict(rope_parameters=_YARN),
        _SIZES | dict(use_sliding_window=True, sliding_window=4, max_window_layers=1),
    ],
    "qwen3": [_WIDE, _WIDE | dict(attention_bias=True)],
    "seed_oss": [_WIDE, _WIDE | dict(attention_out_bias=True, mlp_bias=True)],
    "smollm3": [
        _SIZES | dict(no_rope_layers=[1, 0, 1]),
        _SIZES | dict(no_rope_layers=[1, 0, 1], use_sliding_window=True, sliding_window=5),
    ],
    "stablelm": [
        _SIZES | dict(use_qkv_bias=True),
        _SIZES | dict(use_parallel_residual=True, qk_layernorm=True) | _partial(0.5),
    ],
    "starcoder2": [_SIZES, _SIZES | dict(use_bias=False, sliding_window=6)],
}

_MIXTURE = _SIZES | dict(num_experts=7, num_experts_per_tok=3)
_NARROW = _MIXTURE | dict(moe_intermediate_size=24)
_LOCAL = _SIZES | dict(num_local_experts=7, num_experts_per_tok=3)
_ROUTED = _WIDE | dict(moe_intermediate_size=24, num_experts_per_tok=3)
_ERNIE = _SIZES | dict(moe_intermediate_size=24)
_GRANITE = dict(
    embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.5, logits_scaling=4.0
)
_STEPS = dict(decoder_sparse_step=2, num_hidden_layers=4, mlp_only_layers=[3])
_MIMO = _ROUTED | dict(num_key_value_heads=1, n_routed_experts=8, layer_types=_KINDS)
TINY |= {
    "afmoe": [
        _NARROW
        | dict(head_dim=12, layer_types=_KINDS, sliding_window=5, num_dense_layers=1, mup_enabled=True)
        | dict(num_shared_experts=1, route_scale=1.4),
        _NARROW | dict(head_dim=8, sliding_window=40, global_attn_every_n_layers=2, attention_bias=True),
    ],
    "gemma4_text": [
        _WIDE
        | dict(global_head_dim=16, num_global_key_value_heads=1, attention_k_eq_v=True)
        | dict(layer_types=_KINDS[1:] + _KINDS[:2], sliding_window=4, num_hidden_layers=4)
        | dict(enable_moe_block=True, num_experts=7, top_k_experts=3, moe_intermediate_size=24)
        | dict(final_logit_softcapping=3.0, hidden_size_per_layer_input=0),
        _WIDE
        | dict(global_head_dim=12, num_hidden_layers=2, layer_types=_KINDS[:2], sliding_window=6)
        | dict(attention_bias=True, hidden_size_per_layer_input=0),
    ],
    "llama4_text": [
        _LOCAL
        | dict(head_dim=12, intermediate_size_mlp=48, no_rope_layers=[1, 0, 1], attention_chunk_size=5)
        | dict(moe_layers=[0, 1], floor_scale=4, attn_scale=0.5),
        _LOCAL
        | dict(head_dim=8, intermediate_size_mlp=24, no_rope_layers=[0, 1, 1], attention_chunk_size=None)
        | dict(use_qk_norm=False, attn_temperature_tuning=False, attention_bias=True),
    ],
    "mimo_v2_flash": [
        _MIMO | dict(v_head_dim=8, sliding_window=5, n_group=4, topk_group=2),
        _MIMO | dict(v_head_dim=12, sliding_window=5, attention_value_scale=None, attention_bias=True),
    ],
    "cohere2_moe": [
        _MIXTURE
        | dict(
            head_dim=12,
            layer_types=_KINDS[1:] + _KINDS[:1],
            sliding_window=40,
            logit_scale=0.3,
            num_shared_experts=2,
        )
        | dict(mlp_layer_types=["dense", "sparse", "sparse"], prefix_dense_intermediate_size=24),
        _MIXTURE
        | dict(
            head_dim=8,
            layer_types=_KINDS,
            sliding_window=40,
            rms_norm_eps=1e-5,
            logit_scale=2.0,
        )
        | dict(expert_selection_fn="sigmoid", num_shared_experts=1, shared_expert_combination_strategy="sum"),
    ],
    "ernie4_5_moe": [
        _ERNIE | dict(moe_num_experts=7, moe_k=3),
        _ERNIE
        | dict(moe_num_experts=5, moe_k=2, moe_num_shared_experts=0, use_bias=True, tie_word_embeddings=False)
        | dict(num_hidden_layers=4, moe_layer_start_index=0, moe_layer_end_index=2, moe_layer_interval=2),
    ],
    "glm4_moe": [
        _ROUTED
        | dict(n_routed_experts=8, use_qk_norm=True, n_group=4, topk_group=2, routed_scaling_factor=1.3),
        _ROUTED
        | dict(n_routed_experts=7, attention_bias=True, n_shared_experts=2, first_k_dense_replace=2)
        | dict(norm_topk_prob=False),
    ],
    "gpt_oss": [
        _LOCAL
        | dict(head_dim=12, sliding_window=5, layer_types=_KINDS, swiglu_limit=0.4)
        | dict(rope_parameters=_YARN | dict(truncate=False)),
        _LOCAL
        | dict(head_dim=8, layer_types=["full_attention"] * 3, attention_bias=False)
        | dict(rope_parameters=dict(rope_type="default", rope_theta=500.0)),
    ],
    "granitemoe": [_LOCAL | _GRANITE, _LOCAL | dict(attention_bias=True)],
    "granitemoeshared": [_LOCAL | _GRANITE | dict(shared_intermediate_size=24), _LOCAL],
    "hy_v3": [
        _NARROW | dict(head_dim=12),
        _NARROW
        | dict(head_dim=8, num_shared_experts=2, mlp_bias=True, attention_bias=True)
        | dict(mlp_layer_types=["sparse", "dense", "sparse"]),
    ],
    "minimax_m2": [_LOCAL | dict(head_dim=12, rotary_dim=6)],
    "mixtral": [_LOCAL | dict(head_dim=12), _LOCAL | dict(sliding_window=40)],
    "olmoe": [_MIXTURE, _MIXTURE | dict(norm_topk_prob=True, attention_bias=True)],
    "qwen2_moe": [
        _NARROW | dict(shared_expert_intermediate_size=24),
        _NARROW | _STEPS | dict(shared_expert_intermediate_size=24, qkv_bias=False, norm_topk_prob=True),
    ],
    "qwen3_moe": [
        _NARROW | dict(head_dim=12, norm_topk_prob=True),
        _NARROW | _STEPS | dict(head_dim=8, attention_bias=True),
    ],
}


COUNT_PADDING = {"llama4_text"}
"""Families for which transformers counts the padding before a prompt as positions. The prompts of a reference run
alone."""


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model in the config's dtype with random weights, such that every one of them matters to the logits."""
    torch.manual_seed(0)
    dtype = config.dtype or torch.float32
    # With "eager", transformers adds the ALiBi of a Falcon twice: in the mask and to the scores.
    how = "sdpa" if getattr(config, "alibi", False) else "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=how)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.15)
            if parameter.ndim == 1 or "norm" in name:
                parameter.add_(0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):  # of a router
                buffer.normal_(std=0.15)
            if name.endswith("layer_scalar"):
                buffer.normal_(mean=1.0, std=0.15)
    model.tie_weights()
    model.generation_config.eos_token_id = None  # a row stops where a test says so
    model.config.dtype = dtype
    return model.eval().to(dtype)
