"""GGUF files of tiny models of transformers, as llama.cpp's convert_hf_to_gguf.py makes them.

The names of tensors and of metadata come from the package gguf, so that they do not repeat the tables in flexgen.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from tiny_families import TINY, random_model
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel


class Tiny(NamedTuple):
    """A tiny config of `family`: the one of `TINY` with this number, with changes."""

    family: str
    number: int = 0
    changes: dict[str, Any] = {}  # noqa: RUF012


_PLAIN_ROPE = dict(rope_parameters=dict(rope_type="default", rope_theta=500.0))
_LINEAR = dict(rope_parameters=dict(rope_type="linear", rope_theta=500.0, factor=4.0))
_PARTIAL = dict(rope_parameters=dict(rope_type="default", rope_theta=500.0, partial_rotary_factor=0.5))
_LONG = dict(
    original_max_position_embeddings=8,
    rope_parameters=dict(
        rope_type="longrope", rope_theta=500.0, short_factor=[1.0, 1.5, 1.2, 1.1], long_factor=[2.0, 5.0, 3.0, 4.0],
        original_max_position_embeddings=8,
    ),
)  # fmt: skip
_UNSCALED = dict(query_pre_attn_scalar=12)
_OFF = dict(no_rope_layers=[1, 1, 1, 0], num_hidden_layers=4)

FILES: dict[str, list[Tiny]] = {
    "arcee": [Tiny("arcee", 0, _PLAIN_ROPE)],
    "cohere2": [Tiny("cohere2", 0, dict(layer_types=None, num_hidden_layers=4, sliding_window=5))],
    "command-r": [Tiny("cohere"), Tiny("cohere", 1)],
    "ernie4_5": [Tiny("ernie4_5"), Tiny("ernie4_5", 1)],
    "gemma": [Tiny("gemma")],
    "gemma2": [Tiny("gemma2", 0, _UNSCALED)],
    "gemma3": [Tiny("gemma3_text", 0, _UNSCALED | dict(layer_types=None, num_hidden_layers=7))],
    "glm4": [Tiny("glm4"), Tiny("glm4", 1)],
    "glm4moe": [Tiny("glm4_moe"), Tiny("glm4_moe", 1)],
    "gpt-oss": [Tiny("gpt_oss", 0, dict(swiglu_limit=7.0))],
    "granite": [Tiny("granite")],
    "granitemoe": [Tiny("granitemoeshared"), Tiny("granitemoeshared", 1)],
    "llama": [Tiny("llama"), Tiny("llama", 1), Tiny("llama", 1, _LINEAR), Tiny("mistral"), Tiny("mixtral")],
    "minimax-m2": [Tiny("minimax_m2")],
    "olmo2": [Tiny("olmo2")],
    "olmoe": [Tiny("olmoe")],
    "phi3": [Tiny("phi3"), Tiny("phi3", 0, _PARTIAL), Tiny("phi3", 0, _LONG | dict(sliding_window=7))],
    "qwen2": [Tiny("qwen2"), Tiny("qwen2", 1)],
    "qwen3": [Tiny("qwen3")],
    "qwen3moe": [Tiny("qwen3_moe")],
    "seed_oss": [Tiny("seed_oss"), Tiny("seed_oss", 1, dict(mlp_bias=False))],
    "smollm3": [Tiny("smollm3", 0, _OFF)],
}
"""Tiny models of each architecture, which together use all of its keys."""

_WINDOWED = ("cohere2", "gemma2", "gemma3_text", "gpt_oss", "phi3")
_PAIRED = ("arcee", "granite", "granitemoe", "llama", "smollm3")
_RENAMED = {
    ".block_sparse_moe.": ".mlp.",
    "mlp.router.": "mlp.gate.",
    "mlp.e_score": "mlp.gate.e_score",
    "e_score_correction_bias": "e_score_correction.bias",
    "shared_mlp.output_linear": "mlp.shared_experts.down_proj",
}
"""Names of layers as convert_hf_to_gguf.py knows them."""
_EXPERTS = re.compile(r"(?P<module>.*\.experts)\.(?P<name>gate_up_proj|down_proj)(?P<bias>_bias)?")


def tiny(given: Tiny, **changes: Any) -> PreTrainedModel:
    """The model of a tiny config."""
    config = {**copy.deepcopy(TINY[given.family][given.number]), **copy.deepcopy(given.changes), **changes}
    return random_model(CONFIG_MAPPING[given.family](**config))


def round_matrices(model: PreTrainedModel, kind: str) -> None:
    """Give the matrices whose rows fit the blocks of a type the values that it can store."""
    number = gguf.GGMLQuantizationType[kind]
    for parameter in model.parameters():
        if parameter.ndim == 2 and not parameter.shape[1] % gguf.GGML_QUANT_SIZES[number][0]:
            blocks = gguf.quantize(parameter.detach().numpy(), number)
            parameter.data.copy_(Tensor(gguf.dequantize(blocks, number)))


def write_gguf(path: Path, architecture: str, model: PreTrainedModel, **options: Any) -> Path:
    """Write a model; `options` are those of `_Writer`. Returns the first file."""
    return _Writer(path, architecture, **options).write(model)


@dataclass
class _Writer:
    """kind: the type of matrices whose rows fit its blocks and whose names end in `only`. size: the bytes after which
    another file begins; 0 for one file. stored: blocks of the type for parameters by their names. tensors: further
    ones. left_out: a tensor that is not written. changes: other metadata, None for a key that is not written."""

    path: Path
    architecture: str
    kind: str = "F32"
    only: str = ""
    size: int = 0
    stored: dict[str, np.ndarray] = field(default_factory=dict)
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    left_out: str = ""
    changes: dict[str, Any] = field(default_factory=dict)

    def write(self, model: PreTrainedModel) -> Path:
        writer = gguf.GGUFWriter(self.path, self.architecture, split_max_size=self.size)
        _add_metadata(writer, model.config)
        for key, value in self.changes.items():
            for values in writer.kv_data:
                values.pop(key, None)
            if value is not None:
                is_list = isinstance(value, list)
                kind = gguf.GGUFValueType.ARRAY if is_list else gguf.GGUFValueType.get_type(value)
                writer.add_key_value(
                    key, value, kind, gguf.GGUFValueType.get_type(value[0]) if is_list else None
                )
        for name, data in self.tensors.items():
            writer.add_tensor(name, data)
        number = gguf.GGMLQuantizationType[self.kind]
        for name, data, blocks in _tensors(self.architecture, model, self.stored):
            plain = (
                data.ndim == 1 or "ffn_gate_inp" in name or self.kind == "F32" or not name.endswith(self.only)
            )
            if name == self.left_out:
                continue
            if plain or data.shape[-1] % gguf.GGML_QUANT_SIZES[number][0]:
                writer.add_tensor(name, data)
            else:
                writer.add_tensor(
                    name, gguf.quantize(data, number) if blocks is None else blocks, raw_dtype=number
                )
        writer.write_header_to_file(self.path)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return (
            sorted(self.path.parent.glob(f"{self.path.stem}-00001-of-*.gguf"))[0] if self.size else self.path
        )


def _add_metadata(writer: gguf.GGUFWriter, config: Any) -> None:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id if isinstance(config.eos_token_id, int) else 2)
    if head_dim * heads != config.hidden_size:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if (eps := getattr(config, "rms_norm_eps", None)) is not None:
        writer.add_layer_norm_rms_eps(eps)
    if (eps := getattr(config, "layer_norm_eps", None)) is not None:
        writer.add_layer_norm_eps(eps)
    if (window := getattr(config, "sliding_window", None)) and config.model_type in _WINDOWED:
        writer.add_sliding_window(window)
    if getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    _add_scales(writer, config)
    _add_experts(writer, config)
    _add_rope(writer, config, head_dim)


def _add_scales(writer: gguf.GGUFWriter, config: Any) -> None:
    if config.model_type.startswith("granite"):
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    elif config.model_type in ("cohere", "cohere2"):
        writer.add_logit_scale(config.logit_scale)


def _add_experts(writer: gguf.GGUFWriter, config: Any) -> None:
    counts = [getattr(config, f"{kind}_experts", None) for kind in ("num_local", "num", "n_routed")]
    if not (count := next(filter(None, counts), None)):
        return
    writer.add_expert_count(count)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if config.model_type in ("gpt_oss", "minimax_m2"):
        writer.add_expert_feed_forward_length(config.intermediate_size)
    elif hasattr(config, "moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if getattr(config, "shared_intermediate_size", None):
        writer.add_expert_shared_feed_forward_length(config.shared_intermediate_size)
    if config.model_type in ("glm4_moe", "minimax_m2"):
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if config.model_type == "glm4_moe":
        writer.add_expert_shared_count(config.n_shared_experts)
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)
        writer.add_expert_weights_norm(config.norm_topk_prob)
        writer.add_expert_weights_scale(config.routed_scaling_factor)
        writer.add_leading_dense_block_count(config.first_k_dense_replace)
        writer.add_nextn_predict_layers(config.num_nextn_predict_layers)
        writer.add_block_count(config.num_hidden_layers + config.num_nextn_predict_layers)


def _add_rope(writer: gguf.GGUFWriter, config: Any, head_dim: int) -> None:
    rope = config.rope_parameters
    if config.model_type == "gemma3_text":
        assert rope["sliding_attention"]["rope_theta"] == 500.0
        writer.add_key_value("gemma3.rope.freq_base_swa", 500.0, gguf.GGUFValueType.FLOAT32)
        rope = rope["full_attention"]
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * (rope.get("partial_rotary_factor") or 1)))
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "longrope":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        factor = config.max_position_embeddings / config.original_max_position_embeddings
        length = np.log(config.original_max_position_embeddings)
        writer.add_rope_scaling_attn_factors(float(np.sqrt(1 + np.log(factor) / length)))
        for which in ("long", "short"):
            writer.add_tensor(f"rope_factors_{which}.weight", np.float32(rope[f"{which}_factor"]))


def _tensors(
    architecture: str, model: PreTrainedModel, stored: dict[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray, np.ndarray | None]]:
    """The tensors of a file, as converted: name, values, and the blocks in `stored` if there are any."""
    config = model.config
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    for name, tensor in _separate(model):
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        if architecture in _PAIRED and (which := re.search(r"\.(q|k)_proj\.", name)):
            tensor = _paired(
                tensor, config.num_attention_heads if which[1] == "q" else config.num_key_value_heads
            )
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor + 1
        yield found, tensor.contiguous().numpy(), stored.get(name)


def _separate(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model, with those of experts as a stack for each projection."""
    for name, tensor in model.state_dict().items():
        name = f"{name}.weight" if name.endswith("sinks") else name
        for given, known in _RENAMED.items():
            name = name.replace(given, known)
        if name.endswith("shared_mlp.input_linear.weight"):
            shared = name.replace("shared_mlp.input_linear", "mlp.shared_experts.{}_proj")
            for which, part in zip(("gate", "up"), tensor.chunk(2), strict=True):
                yield shared.format(which), part
            continue
        if not (match := _EXPERTS.fullmatch(name)):
            yield name, tensor
            continue
        end = ".bias" if match["bias"] else ".weight"
        mixed = model.config.model_type == "gpt_oss"
        if mixed and not match["bias"]:
            tensor = tensor.transpose(1, 2)
        if match["name"] == "down_proj":
            yield f"{match['module']}.down_proj{end}", tensor
        else:
            gate, up = (tensor[:, 0::2], tensor[:, 1::2]) if mixed else tensor.chunk(2, dim=1)
            yield f"{match['module']}.gate_proj{end}", gate
            yield f"{match['module']}.up_proj{end}", up


def _paired(tensor: Tensor, heads: int) -> Tensor:
    """The rows of queries or keys with the two values of a rotary pair as neighbours."""
    halves = tensor.reshape(heads, 2, len(tensor) // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)
