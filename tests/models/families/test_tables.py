"""Every family against transformers: logits, wrong tables, and the fields of configs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny_families import TINY
from transformers import CONFIG_MAPPING, PreTrainedConfig

from flexgen.errors import ModelError
from flexgen.kernels.scoring import Window, alibi_slopes
from flexgen.models import fields
from flexgen.models.families import config_from_dict, known_families, spec_from_config
from flexgen.models.mlp_spec import ClampedGLU, MixtureSpec
from flexgen.models.spec import LayerSpec, ModelSpec, ScoreSpec

VARIANTS = [(family, number) for family, configs in TINY.items() for number in range(len(configs))]
each_variant = pytest.mark.parametrize(("family", "number"), VARIANTS, ids=lambda value: str(value))


def _config(family: str, number: int = 0, **changes: Any) -> PreTrainedConfig:
    return CONFIG_MAPPING[family](**copy.deepcopy(TINY[family][number]) | changes)


def test_every_family_has_tiny_configs() -> None:
    assert known_families() == sorted(TINY)


@each_variant
def test_logits_equal_transformers(
    family: str, number: int, tiny_model: Any, assert_equals_transformers: Any
) -> None:
    """Logits of a left-padded batch: in one pass, in chunks, token by token, and with whole layers."""
    assert_equals_transformers(tiny_model(family, number))


@pytest.mark.parametrize("family", TINY)
def test_bfloat16_errs_no_more_than_transformers(
    family: str, tiny_model: Any, save: Any, runner: Any
) -> None:
    """Both against the same weights in float32."""
    model = tiny_model(family, dtype=torch.bfloat16)
    ids = torch.randint(4, 67, (8, 14), generator=torch.Generator().manual_seed(1))
    theirs = model(ids).logits.float()
    opened = runner(save(model), torch.bfloat16)
    ours = opened.full(ids, [0] * 8).float()
    exact = model.float()(ids).logits
    # Rounding can change which experts a token chooses, which changes all of its later values.
    mixes = any(isinstance(layer.mlp, MixtureSpec) for layer in opened.spec.layers)

    def error(logits: torch.Tensor) -> float:
        differences = (logits - exact).abs()
        return (differences.median() if mixes else differences.square().mean().sqrt()).item()

    assert error(ours) < 1.2 * error(theirs) + 1e-3
    assert error(ours) < 0.1 * exact.std()


Change = Callable[[ModelSpec], ModelSpec]


def _layers(**changes: Any) -> Change:
    return lambda spec: replace(spec, layers=tuple(replace(layer, **changes) for layer in spec.layers))


def _part(part: str, **changes: Any) -> Change:
    """Changes of each layer's attention, MLP or norms."""

    def changed(layer: LayerSpec) -> LayerSpec:
        return replace(layer, **{part: replace(getattr(layer, part), **changes)})

    return lambda spec: replace(spec, layers=tuple(map(changed, spec.layers)))


def _values(**changes: Any) -> Change:
    """Changes of the values of attention."""

    def changed(layer: LayerSpec) -> LayerSpec:
        values = replace(layer.attention.values, **changes)
        return replace(layer, attention=replace(layer.attention, values=values))

    return lambda spec: replace(spec, layers=tuple(map(changed, spec.layers)))


def _rope(**changes: Any) -> Change:
    def changed(layer: LayerSpec) -> LayerSpec:
        rope = layer.attention.rope and replace(layer.attention.rope, **changes)
        return replace(layer, attention=replace(layer.attention, rope=rope))

    return lambda spec: replace(spec, layers=tuple(map(changed, spec.layers)))


def _mixture(**changes: Any) -> Change:
    """Changes of each mixture."""

    def changed(layer: LayerSpec) -> LayerSpec:
        mixes = isinstance(layer.mlp, MixtureSpec)
        return replace(layer, mlp=replace(layer.mlp, **changes)) if mixes else layer

    return lambda spec: replace(spec, layers=tuple(map(changed, spec.layers)))


def _router(**changes: Any) -> Change:
    """Changes of each mixture's router."""

    def changed(layer: LayerSpec) -> LayerSpec:
        if not isinstance(layer.mlp, MixtureSpec):
            return layer
        return replace(layer, mlp=replace(layer.mlp, router=replace(layer.mlp.router, **changes)))

    return lambda spec: replace(spec, layers=tuple(map(changed, spec.layers)))


def _norms(**changes: Any) -> Change:
    """Changes of every norm of a layer."""

    def changed(layer: LayerSpec) -> LayerSpec:
        norms = {place: norm and replace(norm, **changes) for place, norm in vars(layer.norms).items()}
        return replace(layer, norms=replace(layer.norms, **norms))

    return lambda spec: replace(spec, layers=tuple(map(changed, spec.layers)))


def _rotates_all(spec: ModelSpec) -> ModelSpec:
    (rope,) = {layer.attention.rope for layer in spec.layers} - {None}
    return _part("attention", rope=rope)(spec)


def _norm_after_rope(spec: ModelSpec) -> ModelSpec:
    (norm,) = {layer.attention.qk_norm for layer in spec.layers}
    assert norm is not None
    return _part("attention", qk_norm=replace(norm, after_rope=True))(spec)


def _query_offset(spec: ModelSpec) -> ModelSpec:
    """Query scaling without the offset of positions."""

    def changed(layer: LayerSpec) -> LayerSpec:
        scores = layer.attention.scores
        scores = replace(scores, by_position=scores.by_position and replace(scores.by_position, offset=0))
        return replace(layer, attention=replace(layer.attention, scores=scores))

    return replace(spec, layers=tuple(map(changed, spec.layers)))


def _router_scale(spec: ModelSpec) -> ModelSpec:
    """A router whose input has only its norm."""
    (norms,) = {layer.mlp.norms for layer in spec.layers if isinstance(layer.mlp, MixtureSpec)}
    assert norms is not None
    return _mixture(norms=replace(norms, router_scale=1.0))(spec)


MUTATIONS: dict[str, tuple[str, int, Change]] = {
    "pairs of neighbours": ("glm", 0, _rope(interleaved=False)),
    "pairs of halves": ("gpt_neox", 0, _rope(interleaved=True)),
    "part of a head": ("phi3", 1, _rope(inv_freq=(1.0, 0.5))),
    "layers without rope": ("smollm3", 0, _rotates_all),
    "rope of a kind of layer": ("olmo3", 1, _rope(inv_freq=(1.0, 0.3, 0.1, 0.03))),
    "queries scaled by position": ("ministral3", 0, _part("attention", scores=ScoreSpec())),
    "scale of scores": ("granite", 0, _part("attention", scores=ScoreSpec())),
    "form of a fused matrix": ("gpt_neox", 0, _part("attention", qkv="rows")),
    "form of four parts": ("codegen", 0, _part("attention", qkv="heads")),
    "form of groups": ("falcon", 0, _part("attention", qkv="rows")),
    "transposed": ("gpt2", 0, lambda spec: replace(spec, transposed=frozenset({"qkv", "up", "down"}))),
    "bias of queries": ("qwen2", 0, _part("attention", qkv_bias=False)),
    "bias of the output": ("starcoder2", 0, _part("attention", out_bias=False)),
    "norm of each head": ("qwen3", 0, _part("attention", qk_norm=None)),
    "norm of all heads": ("olmo2", 0, _part("attention", qk_norm=None)),
    "norms of heads": ("cohere", 1, _part("attention", qk_norm=None)),
    "norms of heads by head": ("stablelm", 1, _part("attention", qk_norm=None)),
    "activation": ("nemotron", 0, _part("mlp", activation="relu")),
    "kind of norm": ("stablelm", 0, _norms(kind="rms", bias=False)),
    "bias of a norm": ("stablelm", 0, _norms(bias=False)),
    "plus": ("gemma", 0, _norms(plus=0.0)),
    "plus of a layer norm": ("nemotron", 0, _norms(plus=0.0)),
    "place of a norm": ("olmo2", 0, _layers(residual="post")),
    "norms after": ("glm4", 0, _part("norms", attention_out=None)),
    "parallel": ("gpt_neox", 0, _layers(residual="serial")),
    "serial": ("gpt_neox", 1, _layers(residual="parallel")),
    "scale of a residual": ("granite", 0, _layers(residual_scale=1.0)),
    "scale of embeddings": ("gemma", 0, lambda spec: replace(spec, embed_scale=1.0)),
    "scale of logits": ("cohere", 0, lambda spec: replace(spec, logit_scale=1.0)),
    "number of experts of a token": ("mixtral", 0, _router(top_k=2)),
    "score of experts": ("minimax_m2", 0, _router(score="softmax")),
    "scores of the chosen only": ("granitemoe", 0, _router(scored="all")),
    "scores of all": ("qwen2_moe", 0, _router(scored="chosen")),
    "correction of the choice": ("glm4_moe", 1, _router(correction=False)),
    "groups of experts": ("glm4_moe", 0, _router(groups=1)),
    "chosen groups": ("glm4_moe", 0, _router(top_groups=3)),
    "sum of the factors": ("qwen3_moe", 1, _router(normalised=True)),
    "scale of the factors": ("hy_v3", 0, _router(scale=1.0)),
    "bias of a router": ("gpt_oss", 0, _router(bias=False)),
    "biases of experts": ("gpt_oss", 0, _mixture(bias=False)),
    "clamped experts": ("gpt_oss", 0, _mixture(clamped=None)),
    "limits of experts": ("gpt_oss", 0, _mixture(clamped=ClampedGLU(1.702, 7.0))),
    "shared expert": ("granitemoeshared", 0, _mixture(shared=None)),
    "gate of a shared expert": ("qwen2_moe", 0, _mixture(shared_gate=False)),
    "average with a shared expert": ("cohere2_moe", 0, _mixture(scale=1.0)),
    "gate of attention": ("afmoe", 0, _part("attention", gate=False)),
    "queries scaled from position 1": ("llama4_text", 0, _query_offset),
    "norm of queries and keys after the rotation": ("llama4_text", 0, _part("attention", qk_norm=None)),
    "weighted inputs of experts": ("llama4_text", 0, _mixture(weighted="outputs")),
    "halves of a fused matrix": ("llama4_text", 0, _mixture(first="interleaved")),
    "chunks of a kind of layer": ("llama4_text", 0, _part("attention", window=Window(5))),
    "norm of values": ("gemma4_text", 0, _values(norm=None)),
    "scale of a layer": ("gemma4_text", 0, _layers(scaled=False)),
    "scale of a router's input": ("gemma4_text", 0, _router_scale),
    "scales of experts": ("gemma4_text", 0, _mixture(expert_scale=False)),
    "norms of a mixture": ("gemma4_text", 0, _mixture(norms=None)),
    "scale of values": ("mimo_v2_flash", 0, _values(scale=1.0)),
    "sinks": ("mimo_v2_flash", 0, _part("attention", scores=ScoreSpec())),
    "windows": ("mistral", 1, _part("attention", window=None)),
    "sizes of windows": ("gemma3_text", 0, _part("attention", window=Window(5))),
    "chunks": ("mistral", 1, _part("attention", window=Window(5, chunked=True))),
    "cap of scores": ("gemma2", 0, _part("attention", scores=ScoreSpec(7**-0.5))),
    "cap of logits": ("gemma2", 0, lambda spec: replace(spec, logit_cap=None)),
    "cap of logits of Gemma 3": ("gemma3_text", 1, lambda spec: replace(spec, logit_cap=None)),
    "ALiBi": ("bloom", 0, _part("attention", scores=ScoreSpec())),
    "ALiBi divided like scores": ("falcon", 4, _part("attention", scores=ScoreSpec(alibi=alibi_slopes(4)))),
    "norm of embeddings": ("bloom", 0, lambda spec: replace(spec, embed_norm=None)),
    "norm before the rotation": ("qwen3", 0, _norm_after_rope),
    "bias of the head": ("phi", 0, lambda spec: replace(spec, head_bias=False)),
}


CHANGED = ("layers", "transposed", "embed_scale", "embed_norm", "logit_scale", "logit_cap", "head_bias")
"""Fields of a spec that any of them changes."""


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_table_that_says_otherwise_gives_other_logits(
    mutation: str, tiny_model: Any, save: Any, runner: Any
) -> None:
    family, number, change = MUTATIONS[mutation]
    directory = save(tiny_model(family, number))
    right = runner(directory, torch.float32)
    changed = {name: getattr(change(right.spec), name) for name in CHANGED}
    wrong = runner(directory, torch.float32, **changed)
    ids = torch.randint(4, 67, (2, 14), generator=torch.Generator().manual_seed(1))
    assert (wrong.full(ids, [0, 3]) - right.full(ids, [0, 3])).abs().max() > 1e-3


def test_when_a_norm_rounds_shows_in_bfloat16(tiny_model: Any, save: Any, runner: Any) -> None:
    right = runner(save(tiny_model("olmo2", dtype=torch.bfloat16)), torch.bfloat16)
    wrong = runner(
        right.checkpoint.directory, torch.bfloat16, layers=_norms(cast="before")(right.spec).layers
    )
    ids = torch.arange(4, 18)[None]
    assert not torch.equal(right.full(ids, [0]), wrong.full(ids, [0]))


# Fields of configs


OF_NO_CONSEQUENCE = {
    "afmoe": {"global_attn_every_n_layers", "sliding_window"},
    "gemma4_text": {"vocab_size_per_layer_input", "use_double_wide_mlp"},
    "llama4_text": {
        "no_rope_layer_interval",
        "interleave_moe_layer_step",
        "moe_layers",
        "intermediate_size_mlp",  # without dense layers
        "attention_chunk_size",  # without layers of that kind
        "attn_scale",  # without attn_temperature_tuning
        "floor_scale",
    },
    "cohere2_moe": {
        "rope_theta",
        "sliding_window_pattern",
        "prefix_dense_sliding_window_pattern",
        "layer_norm_eps",
        "norm_topk_prob",
        "prefix_dense_intermediate_size",
    },
    "ernie4_5_moe": {
        "moe_layer_start_index",
        "moe_layer_end_index",
    },  # of the layers that the interval leaves
    "gpt_oss": {"sliding_window"},
    "hy_v3": {"enable_moe_fp32_combine"},
    "minimax_m2": {"rotary_dim"},
    "qwen2_moe": {
        "intermediate_size",
        "sliding_window",
        "use_sliding_window",
        "max_window_layers",
        "mlp_only_layers",
    },
    "qwen3_moe": {"intermediate_size", "use_sliding_window", "mlp_only_layers"},
    "falcon": {"num_kv_heads", "multi_query", "parallel_attn", "num_ln_in_parallel_attn"},  # by architecture
    "gpt2": {"reorder_and_upcast_attn"},
    "gpt_bigcode": {"attention_softmax_in_fp32", "scale_attention_softmax_in_fp32"},
    "olmo3": {"sliding_window"},
    "phi3": {"original_max_position_embeddings"},
    "qwen2": {"sliding_window", "use_sliding_window", "max_window_layers"},
    "qwen3": {"sliding_window", "use_sliding_window", "max_window_layers"},
    "smollm3": {"sliding_window", "use_sliding_window", "no_rope_layer_interval"},
    "exaone4": {"sliding_window_pattern"},
}
"""Fields that the config's class converts to others, or that are only used with some values of others."""


def _others(value: Any) -> list[Any]:
    """Other values that a config could have instead of `value`."""
    match value:
        case bool():
            return [not value]
        case int() | float():
            return [value + 1]
        case str():
            return ["other"]
        case None:
            return [3]
        case list():
            return [[*value, *value]]
        case _:
            return [{"rope_type": "default", "rope_theta": 77.0}]


@each_variant
def test_no_field_is_passed_over(family: str, number: int) -> None:
    """Another value of any field changes the spec or raises an error."""
    config = _config(family, number)
    spec = spec_from_config(config, "mine")
    of_no_consequence = OF_NO_CONSEQUENCE.get(family, set())
    for field, value in vars(config).items():
        if fields.unrelated(field) or field in of_no_consequence:
            continue
        if field == "rope_parameters" and getattr(config, "alibi", False):
            continue
        for other in _others(value):
            changed = copy.deepcopy(config)
            with suppress(ModelError, StrictDataclassError):  # of this package, and of transformers
                setattr(changed, field, other)
                assert spec_from_config(changed, "mine") != spec, f"{field} = {other}"


@pytest.mark.parametrize("family", TINY)
def test_a_field_that_no_table_reads_is_refused_by_name(family: str) -> None:
    config = _config(family)
    config.made_up_field = 7
    with pytest.raises(ModelError, match="mine: made_up_field = 7 is not supported"):
        spec_from_config(config, "mine")
    config.made_up_field = None
    spec_from_config(config, "mine")


WINDOWS = {
    ("cohere2", 0): [5, None, 5],
    ("exaone4", 0): [None] * 3,
    ("exaone4", 1): [4, None, 4],
    ("gemma2", 0): [4, None, 4],
    ("gemma2", 1): [6, None, 6],
    ("gemma3_text", 1): [5] * 3,
    ("ministral3", 1): [6] * 3,
    ("mistral", 0): [None] * 3,
    ("mistral", 1): [5] * 3,
    ("olmo3", 0): [None] * 3,
    ("olmo3", 1): [6, None, 6],
    ("phi3", 2): [7] * 3,
    ("qwen2", 0): [None] * 3,
    ("qwen2", 2): [None, 4, 4],
    ("smollm3", 1): [None, 5, None],
    ("starcoder2", 1): [6] * 3,
}


@pytest.mark.parametrize(("family", "number"), WINDOWS)
def test_windows_by_layer(family: str, number: int) -> None:
    spec = spec_from_config(_config(family, number), "mine")
    windows = [layer.attention.window for layer in spec.layers]
    assert windows == [size and Window(size) for size in WINDOWS[family, number]]
    assert spec.longest_text == math.inf


@pytest.mark.parametrize("size", [0, -1, "4", 2.5])
def test_a_window_that_is_no_size_is_refused(size: Any) -> None:
    config = _config("mistral")
    config.__dict__["sliding_window"] = size
    with pytest.raises(ModelError, match="sliding_window = .* is not a size"):
        spec_from_config(config, "mine")


@pytest.mark.parametrize("field", ["attn_logit_softcapping", "final_logit_softcapping"])
def test_a_cap_of_zero_is_refused(field: str) -> None:
    with pytest.raises(ModelError, match=f"{field} = 0 is not supported; it must exceed 0"):
        spec_from_config(_config("gemma2", **{field: 0.0}), "mine")


def test_a_cap_that_transformers_passes_over_is_refused() -> None:
    with pytest.raises(ModelError, match="attn_logit_softcapping = 5.0 is not supported: no layer"):
        spec_from_config(_config("gemma3_text", attn_logit_softcapping=5.0), "mine")


ALSO_PUBLISHED: dict[str, dict[str, Any]] = {
    "bloom": dict(
        seq_length=2048,
        n_embed=36,
        unk_token_id=0,
        skip_bias_add=True,
        attention_softmax_in_fp32=True,
        masked_softmax_fusion=True,
        offset_alibi=100,
        bias_dropout_fusion=True,
        hidden_dropout=0.0,
    ),
    "codegen": dict(n_ctx=2048, rotary=True, scale_attn_weights=True, summary_type="cls_index"),
    "cohere": dict(model_max_length=131072, pretraining_tp=1),
    "falcon": dict(apply_residual_connection_post_layernorm=False, auto_map={"AutoConfig": "x.y"}),
    "gemma": dict(hidden_act="gelu", hidden_activation="gelu_pytorch_tanh"),
    "gemma2": dict(hidden_act="gelu_pytorch_tanh", cache_implementation="hybrid", rope_theta=10000.0),
    "gemma3_text": dict(
        sliding_window_pattern=6,
        rope_local_base_freq=10000.0,
        rope_theta=1000000.0,
        cache_implementation="hybrid",
    ),
    "glm": dict(partial_rotary_factor=0.5, rope_theta=10000.0),
    "gpt2": dict(n_ctx=1024, output_past=True, task_specific_params={"text-generation": {"do_sample": True}}),
    "gpt_bigcode": dict(
        inference_runner=0, pad_key_length=True, validate_runner_input=True, max_batch_size=None
    ),
    "gpt_neox": dict(rotary_pct=0.25, rotary_emb_base=10000, attention_probs_dropout_prob=0),
    "gptj": dict(
        rotary=True, gradient_checkpointing=False, scale_attn_weights=True, tokenizer_class="GPT2Tokenizer"
    ),
    "llama": dict(pretraining_tp=1, max_sequence_length=2048, rope_scaling=None, unsloth_version="2025.1"),
    "ernie4_5_moe": dict(moe_gate="topk", moe_use_aux_free=True, moe_capacity=[64] * 3, rope_theta=500000.0),
    "glm4_moe": dict(num_nextn_predict_layers=3, rope_scaling=None, partial_rotary_factor=0.5),
    "minimax_m2": dict(
        attn_type_list=[1] * 3,
        use_qk_norm=True,
        qk_norm_type="per_layer",
        scoring_func="sigmoid",
        use_mtp=True,
        num_mtp_modules=3,
        use_routing_bias=True,
        shared_intermediate_size=0,
        mtp_transformer_layers=1,
    ),
    "mixtral": dict(output_router_logits=True, router_aux_loss_coef=0.02, router_jitter_noise=0.1),
    "qwen3_moe": dict(max_window_layers=48, rope_scaling=None, router_aux_loss_coef=0.01),
    "nemotron": dict(rope_theta=10000.0, partial_rotary_factor=0.5),
    "opt": dict(prefix="</s>", learned_embeddings=True, scale_embeddings=False, activation_dropout=0.0),
    "phi3": dict(full_attn_mod=1, interpolate_factor=1, lm_head_bias=False),
    "qwen2": dict(use_mrope=False, use_sliding_window=False, sliding_window=131072, max_window_layers=28),
    "smollm3": dict(max_window_layers=28, use_sliding_window=False, pretraining_tp=2),
    "starcoder2": dict(norm_type="layer_norm", mlp_type="default", residual_dropout=0.1),
}
"""Fields that configs on the hub have in addition, and that do not change the results."""


@pytest.mark.parametrize("family", ALSO_PUBLISHED)
def test_fields_of_published_configs_are_no_obstacle(family: str) -> None:
    fields = {name: value for name, value in TINY[family][0].items() if name != "rope_parameters"}
    values = fields | dict(model_type=family, architectures=["X"], torch_dtype="bfloat16", use_cache=True)
    plain = spec_from_config(config_from_dict(copy.deepcopy(values), "mine"), "mine")
    assert spec_from_config(config_from_dict(values | ALSO_PUBLISHED[family], "mine"), "mine") == plain


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("mixtral", dict(num_experts_per_tok=8), "num_experts_per_tok = 8 exceeds num_local_experts = 7"),
        ("qwen3_moe", dict(num_experts=0), "num_experts = 0 is not a size"),
        ("glm4_moe", dict(n_group=3), "n_group = 3 and topk_group = 2 do not fit 8 experts"),
        ("glm4_moe", dict(topk_group=1), "topk_group = 1 .* must have 3 experts"),
        ("glm4_moe", dict(topk_group=5), "n_group = 4 and topk_group = 5 do not fit"),
        ("hy_v3", dict(mlp_layer_types=["dense"]), "mlp_layer_types .* one for each of 3 layers"),
        ("cohere2_moe", dict(expert_selection_fn="none"), "expert_selection_fn = 'none' is not supported"),
        ("minimax_m2", dict(attn_type_list=[1, 0, 1]), "attn_type_list = .* is not supported"),
        ("olmoe", dict(clip_qkv=8.0), "clip_qkv = 8.0 is not supported"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(family: str, changes: dict[str, Any], message: str) -> None:
    config = _config(family)
    for field, value in changes.items():
        setattr(config, field, value)
    with pytest.raises(ModelError, match=message):
        spec_from_config(config, "mine")


def test_the_layers_that_are_mixtures() -> None:
    def mixtures(family: str, number: int) -> list[bool]:
        layers = spec_from_config(_config(family, number), "mine").layers
        return [isinstance(layer.mlp, MixtureSpec) for layer in layers]

    assert mixtures("qwen3_moe", 1) == [False, True, False, False]
    assert mixtures("glm4_moe", 1) == [False, False, True]
    assert mixtures("ernie4_5_moe", 0) == [False, True, True]
    assert mixtures("ernie4_5_moe", 1) == [False, True, False, False]
    assert mixtures("hy_v3", 1) == [True, False, True]
    assert mixtures("mixtral", 0) == [True, True, True]
