"""An encoded KV cache: the engine computes what the values that it keeps give, wherever they live and move."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

import flexgen.runtime.choice
from flexgen import OptLM, Policy
from flexgen.policy import Tier
from flexgen.quant import CODECS, head_format
from flexgen.schedule.orders import ORDERS

# Head sizes of one group that fills no vector, and of two whole groups.
CONFIGS = {
    "opt": OPTConfig(
        vocab_size=96, hidden_size=80, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64,
        word_embed_proj_dim=80, max_position_embeddings=64, init_std=0.3, pad_token_id=1,
    ),
    "llama": LlamaConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=128, intermediate_size=64, max_position_embeddings=64, initializer_range=0.3,
    ),
}  # fmt: skip
# Models whose best token is never a near tie, with any of the codecs.
SEEDS = {"opt": 5, "llama": 10}
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [11, 12], [13, 14, 15], [16, 17, 18, 19, 20]]
TOKENS = 9


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Directories of the models, and the same models in transformers."""
    found = {}
    for name, kind in {"opt": OPTForCausalLM, "llama": LlamaForCausalLM}.items():
        torch.manual_seed(SEEDS[name])
        model = kind(CONFIGS[name]).eval()
        directory = tmp_path_factory.mktemp("models") / name
        model.save_pretrained(directory)
        found[name] = directory, model
    return found


class Rounded(DynamicCache):
    """transformers' cache, that keeps what a codec makes of keys and values; a prompt sees itself as it is."""

    def __init__(self, codec: str) -> None:
        super().__init__()
        self.codec = codec

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        first = not self.get_seq_length(layer_idx)
        kept = super().update(self._round(key_states), self._round(value_states), layer_idx, *args, **kwargs)
        return (key_states, value_states) if first else kept

    def _round(self, x: Tensor) -> Tensor:
        heads = head_format(self.codec, x.shape[-1], x.dtype)
        return torch.cat(list(heads.decode(heads.encode(x), x.shape[2], x.dtype)), dim=2)


def reference(model: Any, codec: str, prompt: list[int]) -> tuple[list[int], Tensor]:
    """transformers' greedy ids, and the logits (tokens, vocab) that they were chosen by."""
    return _reference(model, codec, tuple(prompt))


@functools.cache
def _reference(model: Any, codec: str, prompt: tuple[int, ...]) -> tuple[list[int], Tensor]:
    cache, ids, logits = Rounded(codec), torch.tensor([prompt]), []
    with torch.no_grad():
        for _ in range(TOKENS):
            logits.append(model(ids, past_key_values=cache, use_cache=True).logits[0, -1])
            ids = logits[-1].argmax().view(1, 1)
    return [int(row.argmax()) for row in logits], torch.stack(logits)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """The logits (rows, vocab) of each token and batch that the engine chooses from."""
    seen: list[Tensor] = []
    choose = flexgen.runtime.choice.sample
    monkeypatch.setattr(
        flexgen.runtime.choice,
        "sample",
        lambda logits, *args, **options: (seen.append(logits.clone()), choose(logits, *args, **options))[1],
    )
    yield seen


def shares(**given: tuple[float, str]) -> dict[str, Any]:
    return {tier: {"percent": percent, "codec": codec} for tier, (percent, codec) in given.items()}


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


# Keys that differ in their last bit may get codes that differ by one.
MOST_BY_ONE_CODE = dict.fromkeys(CODECS, 0.1) | {"int8": 0.01}

PLACES = [(tier, attend_on) for tier in Tier for attend_on in ("cpu", "gpu")]


@pytest.mark.parametrize("device", ["cpu", "emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("codec", sorted(CODECS))
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_logits_and_ids_are_those_of_a_cache_that_rounds(
    saved: Any, name: str, codec: str, device: str, drawn: list[Tensor]
) -> None:
    directory, model = saved[name]
    expected = [reference(model, codec, prompt) for prompt in PROMPTS]
    for tier, attend_on in PLACES:
        drawn.clear()
        policy = Policy(gpu_batch_size=1, cache=shares(**{tier: (100, codec)}), attend_on=attend_on)
        with OptLM(directory, policy, device=device, dtype="float32", progress=False) as lm:
            for n, prompt in enumerate(PROMPTS):
                ids, logits = expected[n]
                assert lm.generate([prompt], TOKENS, stop=())[0, len(prompt) :].tolist() == ids
                ours = torch.cat(drawn[n * TOKENS :]).cpu()
                assert distance(ours, logits) < MOST_BY_ONE_CODE[codec]


@pytest.mark.parametrize(
    ("codec", "least", "most"), [("int8", 0.001, 0.05), ("fp8", 0.01, 0.2), ("int4", 0.05, 0.5)]
)
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_logits_are_as_near_to_the_exact_ones_as_the_bits_allow(
    saved: Any, name: str, codec: str, least: float, most: float, drawn: list[Tensor]
) -> None:
    """The first token comes of the prompt as it is, so the second follows the same ids in both."""
    directory, model = saved[name]
    with OptLM(directory, Policy(cache=shares(cpu=(100, codec))), device="cpu", dtype="float32") as lm:
        for prompt in PROMPTS:
            drawn.clear()
            lm.generate([prompt], 2, stop=())
            first, second = reference(model, "none", prompt)[1][:2]
            torch.testing.assert_close(drawn[0][0], first, rtol=0, atol=1e-4)
            assert least < distance(drawn[1][0], second) < most


PERCENTS = st.sampled_from([(34, 33, 33), (50, 50, 0), (0, 50, 50), (50, 0, 50), (100, 0, 0), (0, 100, 0)])


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(sorted(CONFIGS)),
    percents=PERCENTS,
    codecs=st.tuples(*[st.sampled_from(["none", *CODECS])] * 3),
    order=st.sampled_from([None, *ORDERS]),
    device=st.sampled_from(["cpu", "emulated"]),
    attend_on=st.sampled_from(["cpu", "gpu"]),
    sep_layer=st.booleans(),
)
def test_each_row_is_rounded_by_the_codec_of_its_tier(
    saved: Any,
    name: str,
    percents: tuple[int, int, int],
    codecs: tuple[str, str, str],
    order: str | None,
    device: str,
    attend_on: str,
    sep_layer: bool,
) -> None:
    """Whatever the order, the device, the split and who attends: padded prompts of two batches, longest first."""
    directory, model = saved[name]
    cache = shares(**dict(zip(Tier, zip(percents, codecs, strict=True), strict=True)))
    batches = 1 if order in ("overlap_single_batch",) else 2
    policy = Policy(
        gpu_batch_size=4 // batches,
        num_gpu_batches=batches,
        cache=cache,
        attend_on=attend_on,
        weights={"cpu": 50, "disk": 50},
        sep_layer=sep_layer,
    )
    tiers = {row: tier for tier, rows in policy.cache.rows(4 // batches).items() for row in rows}
    longest_first = sorted(PROMPTS, key=len, reverse=True)
    with OptLM(directory, policy, device=device, dtype="float32", order=order, progress=False) as lm:
        ids = lm.generate(longest_first, TOKENS, stop=())
    for n, prompt in enumerate(longest_first):
        codec = policy.cache[tiers[n % (4 // batches)]].codec
        assert ids[n, -TOKENS:].tolist() == reference(model, codec, prompt)[0]


def test_several_calls_and_blocks_find_nothing_of_the_last(saved: Any) -> None:
    directory, _ = saved["llama"]
    policy = Policy(gpu_batch_size=2, num_gpu_batches=1, cache=shares(cpu=(50, "int4"), disk=(50, "int8")))
    with OptLM(directory, policy, device="emulated", dtype="float32", progress=False) as lm:
        first = lm.generate(PROMPTS, TOKENS, stop=())
        lm.generate([[30, 31, 32]] * 5, 4, stop=())
        np.testing.assert_array_equal(lm.generate(PROMPTS, TOKENS, stop=()), first)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_half_types(saved: Any, dtype: str, device: str, drawn: list[Tensor]) -> None:
    directory, model = saved["llama"]
    policy = Policy(cache=shares(cpu=(100, "int8")))
    with OptLM(directory, policy, device=device, dtype=dtype, progress=False) as lm:
        lm.generate([PROMPTS[0]], 2, stop=())
    _, expected = reference(model, "none", PROMPTS[0])
    assert distance(drawn[0][0].float(), expected[0]) < 0.05
    assert distance(drawn[1][0].float(), expected[1]) < 0.1
