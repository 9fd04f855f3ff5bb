"""The shapes of models that benchmarks compare with peers, and their random weights."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, Qwen3MoeConfig

SHAPES = {
    "opt-1.3b": OPTConfig(
        hidden_size=2048, ffn_dim=8192, num_hidden_layers=24, num_attention_heads=32, word_embed_proj_dim=2048
    ),
    "llama-1b": LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, vocab_size=128_256, tie_word_embeddings=True,
    ),
    "llama-1b-32k": LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, vocab_size=32_000, tie_word_embeddings=True,
    ),
    "qwen3-30b-a3b-cut": Qwen3MoeConfig(
        hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
        norm_topk_prob=True, num_hidden_layers=2, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
        vocab_size=32_000, max_position_embeddings=2048, mlp_only_layers=[],
    ),
    "tiny": OPTConfig(
        hidden_size=256, ffn_dim=1024, num_hidden_layers=4, num_attention_heads=4, word_embed_proj_dim=256
    ),
}  # fmt: skip


def write_model(name: str, folder: Path) -> None:
    """Write random weights of a shape to one safetensors file, atomically."""
    print(f"{name}: writing random weights to {folder}", file=sys.stderr, flush=True)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SHAPES[name], dtype=torch.bfloat16)
    partial = folder.with_name(folder.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, max_shard_size="100GB")
    partial.rename(folder)
