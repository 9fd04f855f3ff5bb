"""A Llama or Qwen3-MoE checkpoint in safetensors as a GGUF file for llama.cpp, with numpy and gguf only."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

FORMATS = {
    "bf16": GGMLQuantizationType.BF16,
    "fp16": GGMLQuantizationType.F16,
    "int8": GGMLQuantizationType.Q8_0,
    "int4": GGMLQuantizationType.Q4_0,
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}
ROUTER = "mlp.gate.weight"
"""llama.cpp computes the router in float32."""


def write_gguf(model: Path, path: Path, form: str) -> None:
    """Write the checkpoint of the folder `model` (bfloat16, one file) to `path`, atomically.

    Matrices are in the format `form`, norms in float32. The file has no tokenizer: prompts are token ids.
    """
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    partial = path.with_name(f"{path.name}.part")
    mixture = config["model_type"] == "qwen3_moe"
    count = config.get("num_local_experts", config.get("num_experts"))  # transformers 5 writes the first name
    writer = GGUFWriter(partial, "qwen3moe" if mixture else "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config["head_dim"])
    rope = config.get("rope_parameters") or config
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10_000.0)))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    if mixture:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
        writer.add_expert_count(count)
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    experts: dict[str, dict[int, np.ndarray]] = {}
    for name, values in tensors(model / "model.safetensors"):
        if not mixture and (".q_proj" in name or ".k_proj" in name):
            values = interleaved_halves(values, heads if ".q_proj" in name else kv_heads)
        kind = FORMATS[form] if values.ndim == 2 and not name.endswith(ROUTER) else GGMLQuantizationType.F32
        stored = quantize(values, kind)
        if ".experts." not in name:
            writer.add_tensor(gguf_name(name), stored, raw_dtype=kind)
            continue
        before, number, after = re.split(r"(?<=experts\.)(\d+)\.", name)
        stack = experts.setdefault(before + after, {})
        stack[int(number)] = stored
        if len(stack) == count:
            matrices = [stack[n] for n in range(len(stack))]
            writer.add_tensor(gguf_name(before + after), np.stack(matrices), raw_dtype=kind)
            del experts[before + after]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor of transformers' Llama."""
    stem, _, suffix = name.rpartition(".")
    if stem in NAMES:
        return f"{NAMES[stem]}.{suffix}"
    _, _, block, part = stem.split(".", 3)
    return f"blk.{block}.{NAMES[part]}.{suffix}"


def interleaved_halves(matrix: np.ndarray, heads: int) -> np.ndarray:
    """The rows of a query or key matrix in llama.cpp's order.

    Its rotary embedding rotates adjacent rows of a head, transformers' the first with the second half.
    """
    rows, columns = matrix.shape
    return matrix.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The names and values, in float32, of a safetensors file in bfloat16, one at a time."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            assert entry["dtype"] == "BF16", f"{name}: {entry['dtype']}, expected BF16"
            begin, end = entry["data_offsets"]
            file.seek(8 + size + begin)
            halves = np.frombuffer(file.read(end - begin), np.uint16)
            yield name, (halves.astype(np.uint32) << 16).view(np.float32).reshape(entry["shape"])
