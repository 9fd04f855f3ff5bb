"""Sparse attention in whole models: ids are those of transformers with the definition as its attention."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from piece_sizes import piece_sizes
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)
from transformers.masking_utils import eager_mask

from flexgen.engine.model import OptLM
from flexgen.policy import Policy
from flexgen.schedule.orders import ORDERS
from flexgen.units import BLOCK

PAD, VOCAB, TOKENS, UNIT = 1, 96, 24, 16
SIZES = dict(
    vocab_size=VOCAB, hidden_size=128, num_hidden_layers=2, max_position_embeddings=128, pad_token_id=PAD,
    eos_token_id=None,
)  # fmt: skip
CONFIGS: dict[str, Any] = {  # heads of 64 values: 16 tokens of float32 are a block of the disk
    "opt": OPTConfig(**SIZES, num_attention_heads=2, ffn_dim=64, word_embed_proj_dim=128),
    "llama gqa 2": LlamaConfig(
        **SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=64, intermediate_size=64
    ),
}
EQUAL, RAGGED = [60] * 5, [60, 33, 60, 7, 41]


def sparse_attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **options: Any
) -> tuple[Tensor, None]:
    """What flexgen must compute, here for all rows at once. Attention over the prompt is dense."""
    share, unit = module.config.share, module.config.unit
    rows, heads, new, dim = q.shape
    kv_heads, length = k.shape[1:3]
    group = heads // kv_heads
    scores = q @ k.repeat_interleave(group, 1).mT * scaling
    if mask is not None:
        scores = scores + mask
    p = scores.softmax(-1)
    if new == 1:
        real = torch.ones(rows, length - 1, dtype=torch.bool)
        if mask is not None:
            real = mask[:, 0, 0, :-1] == 0
        weights = (p.view(rows, kv_heads, group, length).sum(2)[..., :-1] * real[:, None]).split(unit, -1)
        value = torch.stack([block.sum(-1) for block in weights], -1)
        exists = torch.stack([block.any(-1) for block in real.split(unit, -1)], -1)
        rank = value.masked_fill(~exists[:, None], -1).argsort(-1, descending=True).argsort(-1)
        best = [math.ceil(round(share * blocks, 9)) for blocks in exists.sum(-1).tolist()]
        chosen = rank < torch.tensor(best)[:, None, None]
        kept = torch.ones(rows, kv_heads, length, dtype=torch.bool)
        kept[..., :-1] = chosen.repeat_interleave(unit, -1)[..., : length - 1] & real[:, None]
        p = p * kept.repeat_interleave(group, 1)[:, :, None]
    return (p @ v.repeat_interleave(group, 1)).transpose(1, 2), None


@pytest.fixture(autouse=True, scope="module")
def _short_pages() -> Iterator[None]:
    """Pages on disk of 32 tokens, two blocks of each head in each."""
    with piece_sizes(page_tokens=32, choice_bytes=BLOCK):
        yield


@pytest.fixture(scope="module", params=CONFIGS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    torch.manual_seed(0)
    config = CONFIGS[request.param]
    model = (OPTForCausalLM if isinstance(config, OPTConfig) else LlamaForCausalLM)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.15)
            if "norm.weight" in name:
                parameter.add_(1.0)
    model.tie_weights()
    model.generation_config.eos_token_id = None
    directory = tmp_path_factory.mktemp("model") / "saved"
    model.eval().save_pretrained(directory)
    AttentionInterface.register("sparse_reference", sparse_attention)
    AttentionMaskInterface.register("sparse_reference", eager_mask)
    model.set_attn_implementation("sparse_reference")
    return directory, model


def expected(model: Any, prompts: list[list[int]], share: float, unit: int) -> np.ndarray:
    return _expected(model, tuple(map(tuple, prompts)), share, unit)


@functools.cache  # for every device the same
def _expected(model: Any, prompts: tuple[tuple[int, ...], ...], share: float, unit: int) -> np.ndarray:
    model.config.share, model.config.unit = share, unit
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False, pad_token_id=PAD
        )
    return out.numpy()


def given(lengths: list[int]) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(PAD + 1, VOCAB, length).tolist() for length in lengths]


def generated(
    directory: Path, prompts: list[list[int]], device: str, order: str | None = None, **fields: Any
) -> Any:
    policy = Policy(gpu_batch_size=2, num_gpu_batches=2, **fields)
    with OptLM(directory, policy, device=device, progress=False, order=order) as lm:
        return lm.generate(prompts, TOKENS, stop=())


def test_it_matters(saved: tuple[Path, Any]) -> None:
    """The ids of these models tell dense from sparse attention, and one choice from another."""
    _, model = saved
    prompts = given(EQUAL)
    answers = [expected(model, prompts, *how) for how in ((1.0, 1), (0.1, 1), (0.1, UNIT), (0.4, UNIT))]
    for n, ids in enumerate(answers):
        assert all((ids != other).any() for other in answers[:n])


@pytest.mark.parametrize(
    ("lengths", "share"),
    [(EQUAL, 0.1), (RAGGED, 0.1), (RAGGED, 0.3)],
    ids=["equal", "ragged", "ragged, more"],
)
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_ids_with_the_cache_in_memory(
    saved: tuple[Path, Any], device: str, lengths: list[int], share: float
) -> None:
    directory, model = saved
    prompts = given(lengths)
    answer = expected(model, prompts, share, 1)
    for cache in ({"cpu": 100}, {"gpu": 100}, {"gpu": 50, "cpu": 50}):
        for attend_on in ("cpu", "gpu"):
            ids = generated(directory, prompts, device, cache=cache, attend_on=attend_on, attn_sparsity=share)
            np.testing.assert_array_equal(ids, answer, f"{cache}, {attend_on}")


@pytest.mark.parametrize("share", [0.1, 0.4])
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_ids_with_the_cache_on_disk(saved: tuple[Path, Any], device: str, share: float) -> None:
    """By blocks that the disk can serve; what attends, and where, changes nothing."""
    directory, model = saved
    prompts = given(EQUAL)
    answer = expected(model, prompts, share, UNIT)
    for attend_on in ("cpu", "gpu"):
        ids = generated(
            directory, prompts, device, cache={"disk": 100}, attend_on=attend_on, attn_sparsity=share
        )
        np.testing.assert_array_equal(ids, answer, attend_on)


def test_ids_in_every_order_and_on_every_device(saved: tuple[Path, Any]) -> None:
    directory, _ = saved
    prompts = given(RAGGED)
    thirds = {"gpu": 34, "cpu": 33, "disk": 33}
    every = [
        generated(directory, prompts, device, order, cache=thirds, attend_on=attend_on, attn_sparsity=0.2)
        for device in ("cpu", "emulated")
        for attend_on in ("cpu", "gpu")
        for order in sorted(ORDERS)
    ]
    for ids in every[1:]:
        np.testing.assert_array_equal(ids, every[0])


def test_one_is_exact(saved: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same code as ever: nothing is chosen."""
    directory, model = saved

    def never(*args: Any) -> None:
        raise AssertionError("exact attention chooses nothing")

    monkeypatch.setattr("flexgen.runtime.pages.choose", never)
    thirds = {"gpu": 34, "cpu": 33, "disk": 33}
    for device in ("cpu", "emulated"):
        ids = generated(directory, given(RAGGED), device, cache=thirds, attn_sparsity=1.0)
        np.testing.assert_array_equal(ids, expected(model, given(RAGGED), 1.0, 1))
