"""Models whose shape is known by name, for plans and benchmarks without a download."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from flexgen.models.families import config_from_dict
from flexgen.models.families.opt import SIZES, known_config

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedConfig


class Known(NamedTuple):
    """The repository of a model on the hub, and the fields of its config.json that differ from its class."""

    repository: str
    fields: dict[str, Any]


_QWEN3 = dict(
    model_type="qwen3_moe", vocab_size=151936, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True,
    num_key_value_heads=4, head_dim=128, max_position_embeddings=40960, rope_theta=1e6, rms_norm_eps=1e-6,
    bos_token_id=151643, eos_token_id=151645,
)  # fmt: skip

_OTHERS = {
    "gpt-oss-20b": Known(
        "openai/gpt-oss-20b", dict(model_type="gpt_oss", num_hidden_layers=24, num_local_experts=32)
    ),
    "gpt-oss-120b": Known("openai/gpt-oss-120b", dict(model_type="gpt_oss")),
    "mixtral-8x7b": Known("mistralai/Mixtral-8x7B-v0.1", dict(model_type="mixtral")),
    "mixtral-8x22b": Known(
        "mistralai/Mixtral-8x22B-v0.1",
        dict(
            model_type="mixtral", hidden_size=6144, intermediate_size=16384, num_hidden_layers=56,
            num_attention_heads=48, max_position_embeddings=65536,
        ),
    ),
    "olmoe-1b-7b": Known("allenai/OLMoE-1B-7B-0924", dict(model_type="olmoe", intermediate_size=1024)),
    "qwen3-30b-a3b": Known(
        "Qwen/Qwen3-30B-A3B",
        _QWEN3
        | dict(
            hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=48,
            num_attention_heads=32,
        ),
    ),
    "qwen3-235b-a22b": Known(
        "Qwen/Qwen3-235B-A22B",
        _QWEN3
        | dict(
            hidden_size=4096, intermediate_size=12288, moe_intermediate_size=1536, num_hidden_layers=94,
            num_attention_heads=64,
        ),
    ),
}  # fmt: skip

_REPOSITORIES = {size: f"facebook/{size}" for size in SIZES} | {
    name: known.repository for name, known in _OTHERS.items()
}
_NAMES = {name: name for name in _REPOSITORIES} | {
    repository.lower(): name for name, repository in _REPOSITORIES.items()
}

KNOWN = tuple(_REPOSITORIES)
"""The names of all known models."""


def known_name(model: str) -> str | None:
    """The name in `KNOWN` of "opt-30b", "facebook/opt-30b" or "OPT-30B"; None for any other text."""
    return _NAMES.get(model.lower())


def known_repository(name: str) -> str:
    """The repository on the hub of a name in `KNOWN`."""
    return _REPOSITORIES[name]


def config_of(name: str) -> PreTrainedConfig:
    """The config of a name in `KNOWN`, created without network access."""
    if name in SIZES:
        return known_config(name)
    return config_from_dict({"dtype": "bfloat16", **_OTHERS[name].fields}, name)
