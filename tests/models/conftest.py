"""Tiny random models, and two contexts that stand in for the runtime."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_families import COUNT_PADDING, TINY, random_model
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from flexgen.kernels.attention import decode_attention
from flexgen.kernels.scoring import Scoring
from flexgen.models import build_layers, open_model
from flexgen.models.ops import causal_attention, rope_tables, token_factors
from flexgen.models.spec import RopeSpec

OPT = dict(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48,
    max_position_embeddings=40, word_embed_proj_dim=32,
)  # fmt: skip
LLAMA = dict(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
    intermediate_size=48, max_position_embeddings=40, pad_token_id=0,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> str:
        raise AssertionError(f"the network was asked for: {args} {options}")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    """`make_model("opt", activation_function="gelu")`: a random model whose norms and biases matter."""

    def make(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
        torch.manual_seed(0)
        if family == "opt":
            model = OPTForCausalLM(OPTConfig(**{**OPT, **changes}))
        else:
            model = LlamaForCausalLM(LlamaConfig(**{**LLAMA, **changes}))
        for parameter in model.parameters():
            parameter.normal_(std=0.15)
            if parameter.ndim == 1:
                parameter.add_(0.5)
        model.tie_weights()
        model.config.dtype = dtype
        return model.eval().to(dtype)

    return make


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """`save(model, max_shard_size="20KB")` or `save(model, format="bin", shards=2)`: its directory."""

    def write(model: PreTrainedModel, format: str = "safetensors", shards: int = 1, **options: Any) -> Path:
        directory = tmp_path / "model"
        if format == "safetensors":
            model.save_pretrained(directory, **options)
            return directory
        model.config.save_pretrained(directory)
        tensors = dict(model.state_dict())
        if shards == 1:
            torch.save(tensors, directory / "pytorch_model.bin", **options)
            return directory
        names = list(tensors)
        weight_map = {name: f"pytorch_model-{i % shards}.bin" for i, name in enumerate(names)}
        for file in set(weight_map.values()):
            torch.save({name: tensors[name] for name in names if weight_map[name] == file}, directory / file)
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return directory

    return write


class FullContext:
    """Attention over the tokens given, without a cache; `starts` are the numbers of padding positions."""

    last_only = False
    text_length = None

    def __init__(self, seq: int, starts: list[int]) -> None:
        self.starts = starts
        self.positions = (torch.arange(seq) - torch.tensor(starts)[:, None]).clamp_min(0)

    def rope_factors(self, rope: RopeSpec, dtype: torch.dtype) -> Tensor:
        return token_factors(*rope_tables(rope, self.positions, dtype))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        return causal_attention(q, k, v, self.starts, scoring)

    def keep_new(self, k: Tensor, v: Tensor) -> None:
        pass

    def attend_chunk(self, chunk: Any, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        seen = (chunk.rows, slice(None), slice(chunk.tokens.stop))
        return causal_attention(q, k[seen], v[seen], self.starts[chunk.rows], scoring)


class PagedContext:
    """A cache in zero-filled pages of a few tokens. Call `step` before each pass, to announce its tokens."""

    last_only = True
    text_length = None

    def __init__(self, starts: list[int], page_tokens: int = 4) -> None:
        self.starts, self.page_tokens = torch.tensor(starts), page_tokens
        self.length = 0
        self.caches: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def step(self, seq: int) -> None:
        self.begin, self.length, self.layer = self.length, self.length + seq, 0
        self.positions = (torch.arange(self.begin, self.length) - self.starts[:, None]).clamp_min(0)

    def rope_factors(self, rope: RopeSpec, dtype: torch.dtype) -> Tensor:
        return token_factors(*rope_tables(rope, self.positions, dtype))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        pages = self.caches.setdefault(self.layer, [])
        self.layer += 1
        for token in range(self.begin, self.length):
            if token % self.page_tokens == 0:
                shape = (*k.shape[:2], self.page_tokens, k.shape[3])
                pages.append((k.new_zeros(shape), v.new_zeros(shape)))
            page_k, page_v = pages[token // self.page_tokens]
            page_k[:, :, token % self.page_tokens] = k[:, :, token - self.begin]
            page_v[:, :, token % self.page_tokens] = v[:, :, token - self.begin]
        if self.begin == 0:
            return causal_attention(q, k, v, self.starts.tolist(), scoring)
        return decode_attention(q, pages, self.length, self.starts, scoring)


class Runner:
    """All layers of a saved model, chained; weights in host memory."""

    def __init__(
        self,
        model: Any,
        dtype: torch.dtype,
        sep_layer: bool = True,
        weights: Any = "checkpoint",
        **changes: Any,
    ):
        spec, self.checkpoint = open_model(model, weights)
        self.spec = replace(spec, **changes)
        self.layers = build_layers(self.spec, sep_layer)
        self.checkpoint.verify(self.layers)
        self.weights = [
            {weight.name: self.checkpoint.read(weight, dtype) for weight in layer.weights}
            for layer in self.layers
        ]

    def forward(self, ids: Tensor, ctx: Any) -> Tensor:
        x = ids
        for layer, weights in zip(self.layers, self.weights, strict=True):
            x = layer.forward(x, weights, ctx)
        return x

    def full(self, ids: Tensor, starts: list[int]) -> Tensor:
        """Logits of every position in one pass."""
        return self.forward(ids, FullContext(ids.shape[1], starts))

    def decode(self, ids: Tensor, starts: list[int], prompt: int) -> Tensor:
        """Logits of positions prompt - 1 and later, one token a pass after the prompt."""
        ctx, logits = PagedContext(starts), []
        for begin, end in [(0, prompt), *((t, t + 1) for t in range(prompt, ids.shape[1]))]:
            ctx.step(end - begin)
            logits.append(self.forward(ids[:, begin:end], ctx))
        return torch.cat(logits, dim=1)


@pytest.fixture
def runner() -> type[Runner]:
    return Runner


STARTS = [0, 3, 0, 5]


def _reference(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, passes: list[tuple[int, int]]
) -> list[Tensor]:
    """Logits of transformers for each pass over ids[:, begin:end], with its own cache."""
    if model.config.model_type in COUNT_PADDING and not mask.all():
        by_row = []
        for row, start in enumerate((mask == 0).sum(1).tolist()):
            alone = [(max(begin - start, 0), end - start) for begin, end in passes]
            parts = _reference(model, ids[row : row + 1, start:], mask[row : row + 1, start:], alone)
            by_row.append(
                [
                    F.pad(part, (0, 0, end - begin - part.shape[1], 0))
                    for part, (begin, end) in zip(parts, passes, strict=True)
                ]
            )
        return [torch.cat(rows) for rows in zip(*by_row, strict=True)]
    # Rotary models need the positions of left-padded rows spelt out; OPT derives them from the mask.
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache, logits = None, []
    for begin, end in passes:
        extra = {"position_ids": positions[:, begin:end]} if model.config.model_type != "opt" else {}
        out = model(
            ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True, **extra
        )
        cache = out.past_key_values
        logits.append(out.logits)
    return logits


@pytest.fixture
def tiny_model() -> Callable[..., PreTrainedModel]:
    """`tiny_model("qwen3", 1)`: a random model of the second of a family's tiny configs."""

    def make(family: str, number: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        config = CONFIG_MAPPING[family](**copy.deepcopy(TINY[family][number]), dtype=dtype)
        return random_model(config)

    return make


@pytest.fixture
def assert_equals_transformers(make_model: Any, save: Any) -> Callable[..., None]:
    """Logits of a left-padded batch, in one pass and token by token, with attention and MLP as one layer or two."""

    def check(
        family: str | PreTrainedModel, seq: int = 14, prompt: int = 6, atol: float = 1e-4, **changes: Any
    ) -> None:
        model = make_model(family, **changes) if isinstance(family, str) else family
        ids = torch.randint(4, 64, (len(STARTS), seq), generator=torch.Generator().manual_seed(1))
        mask = (torch.arange(seq) >= torch.tensor(STARTS)[:, None]).long()
        directory = save(model)
        apart, together = (Runner(directory, model.dtype, sep_layer) for sep_layer in (True, False))
        pieces = Runner(directory, model.dtype, chunk_tokens=5)

        (theirs,) = _reference(model, ids, mask, [(0, seq)])
        assert theirs.std() > 0.1, "a flat reference would prove nothing"
        ours = apart.full(ids, STARTS)
        torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], rtol=0, atol=atol)
        ours = pieces.full(ids, STARTS)
        torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], rtol=0, atol=atol)

        steps = [(0, prompt), *((token, token + 1) for token in range(prompt, seq))]
        theirs = torch.cat([logits[:, -1:] for logits in _reference(model, ids, mask, steps)], dim=1)
        torch.testing.assert_close(apart.decode(ids, STARTS, prompt), theirs, rtol=0, atol=atol)
        torch.testing.assert_close(together.decode(ids, STARTS, prompt), theirs, rtol=0, atol=atol)

    return check
