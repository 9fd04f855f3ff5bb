"""Models, prompts and policies that the tests of the simulated GPU share."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase
from hypothesis import strategies as st
from transformers import (
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MiMoV2FlashConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from flexgen import OptLM, Policy
from flexgen.quant import CODECS
from flexgen.runtime.sampler import sample
from flexgen.schedule.orders import ORDERS

GPU = torch.device("cuda", 0)
WITHOUT_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)
"""Phases of hypothesis: a case takes seconds here, and shrinking one would take minutes."""

VOCAB = 64
OPT = OPTConfig(
    vocab_size=VOCAB, hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=2, num_attention_heads=4,
    ffn_dim=64, max_position_embeddings=128,
)  # fmt: skip
LLAMA = LlamaConfig(
    vocab_size=VOCAB, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=128, max_position_embeddings=128,
)  # fmt: skip
MIXTURE = Qwen3MoeConfig(
    vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    intermediate_size=64, moe_intermediate_size=64, num_experts=5, num_experts_per_tok=2, norm_topk_prob=True,
    max_position_embeddings=128, decoder_sparse_step=1, mlp_only_layers=[0],
)  # fmt: skip
GPT_OSS = GptOssConfig(
    vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    intermediate_size=64, num_local_experts=5, num_experts_per_tok=2, sliding_window=5, max_position_embeddings=128,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
)  # fmt: skip
_TINY: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=64, max_position_embeddings=128,
)  # fmt: skip
MISTRAL = MistralConfig(**_TINY, sliding_window=5)
GEMMA2 = Gemma2Config(
    **_TINY, head_dim=16, sliding_window=5, query_pre_attn_scalar=16, attn_logit_softcapping=2.0
)
_KINDS = ["sliding_attention", "full_attention"]
LLAMA4 = Llama4TextConfig(
    **_TINY, head_dim=16, intermediate_size_mlp=64, no_rope_layers=[1, 0], attention_chunk_size=5, floor_scale=4,
    num_local_experts=5, num_experts_per_tok=1,
)  # fmt: skip
GEMMA4 = Gemma4TextConfig(
    **_TINY, head_dim=8, global_head_dim=16, num_global_key_value_heads=1, attention_k_eq_v=True, sliding_window=5,
    layer_types=_KINDS, hidden_size_per_layer_input=0, enable_moe_block=True, num_experts=5, top_k_experts=2,
    moe_intermediate_size=32,
)  # fmt: skip
MIMO = MiMoV2FlashConfig(
    **_TINY, head_dim=12, v_head_dim=8, sliding_window=5, layer_types=_KINDS, mlp_layer_types=["dense", "dense"],
)  # fmt: skip
GEMMA3 = Gemma3TextConfig(**_TINY, head_dim=16, sliding_window=5, layer_types=_KINDS)
BLOOM = BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4)
PROMPTS = [list(range(5, 5 + n)) for n in (3, 9, 4, 4, 7, 2, 5, 6, 3)]

THIRDS = {"gpu": 34, "cpu": 33, "disk": 33}

RESIDENT: dict[str, Any] = {kind: {"gpu": 100} for kind in ("weights", "cache", "activations")}
"""Shares of a policy that keeps everything on the GPU."""


def encoded(codec: str, shares: dict[str, int] = THIRDS) -> dict[str, dict[str, Any]]:
    """Shares of the tiers, each kept in `codec`."""
    return {tier: {"percent": percent, "codec": codec} for tier, percent in shares.items()}


def policy(**changes: Any) -> Policy:
    """Three batches of three prompts, a third of everything on each tier."""
    fields: dict[str, Any] = dict(
        gpu_batch_size=3, num_gpu_batches=3, weights=THIRDS, cache=THIRDS, activations=THIRDS
    )
    return Policy(**fields | changes)


@st.composite
def shares(draw: st.DrawFn, codecs: tuple[str, ...] = ("none",)) -> dict[str, dict[str, Any]]:
    """Percent and codec of each tier."""
    gpu = draw(st.sampled_from([0, 34, 100]))
    cpu = draw(st.sampled_from([0, (100 - gpu) // 2, 100 - gpu]))
    codec = draw(st.sampled_from(codecs))
    return encoded(codec, {"gpu": gpu, "cpu": cpu, "disk": 100 - gpu - cpu})


@st.composite
def policies(draw: st.DrawFn, exact: bool = False) -> Policy:
    """Policies of every kind; `exact` leaves out what rounds."""
    codecs = ("none",) if exact else ("none", *CODECS)
    cache = draw(shares(codecs))
    sparse = not exact and all(share["codec"] == "none" for share in cache.values()) and draw(st.booleans())
    return Policy(
        gpu_batch_size=draw(st.sampled_from([1, 3, 9])),
        num_gpu_batches=draw(st.sampled_from([1, 2, 3])),
        weights=draw(shares(codecs)),
        cache=cache,
        activations=draw(shares()),
        attend_on=draw(st.sampled_from(["gpu", "cpu"])),
        overlap=draw(st.booleans()),
        sep_layer=draw(st.booleans()),
        pin_weight=draw(st.booleans()),
        attn_sparsity=0.5 if sparse else 1.0,
        prefill_chunk=draw(st.sampled_from([0, 0, 3])),
    )


def orders() -> st.SearchStrategy[str | None]:
    """An order by name, or the one that the policy asks for."""
    return st.sampled_from([None, *ORDERS])


def open_on(
    device: str, config: PreTrainedConfig, policy: Policy, dtype: str = "float32", **options: Any
) -> OptLM:
    """The model with its dummy weights, the same ones on every device."""
    return OptLM(config, policy, device=device, weights="dummy", dtype=dtype, progress=False, **options)


def ids_on(
    device: str, config: PreTrainedConfig, policy: Policy, stop: Any = (), **options: Any
) -> np.ndarray:
    """Greedy ids of `PROMPTS`."""
    with open_on(device, config, policy, **options) as model:
        return model.generate(PROMPTS, 6, stop=stop)


@contextlib.contextmanager
def valid_ids() -> Iterator[None]:
    """Ids of the vocabulary, so that stops end rows. Without computed numbers, ids are garbage."""
    made = itertools.count()

    def valid(logits: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        sample(logits, *args, **options)
        ids = torch.arange(len(logits)) * 7 + next(made)
        return (ids % VOCAB).to(logits.device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flexgen.runtime.choice.sample", valid)
        yield
