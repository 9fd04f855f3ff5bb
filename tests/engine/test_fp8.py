"""fp8 through the engine: logits against a model in float64 whose weights and cache are rounded to e4m3 by its
definition, wherever they are stored and whoever attends to them."""

from __future__ import annotations

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

# Head sizes that are no multiple of a scale's 4 bytes, and vocabularies and widths of no group of integers.
CONFIGS = {
    "opt": OPTConfig(
        vocab_size=93, hidden_size=60, num_hidden_layers=2, num_attention_heads=4, ffn_dim=72,
        word_embed_proj_dim=60, max_position_embeddings=64, init_std=0.3, pad_token_id=1,
    ),
    "llama": LlamaConfig(
        vocab_size=93, hidden_size=52, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=22, intermediate_size=70, max_position_embeddings=64, initializer_range=0.3,
    ),
}  # fmt: skip
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [13, 14, 15], [11, 12]]  # longest first, the order of rows in the batch
TOKENS = 6


def rounded(x: Tensor) -> Tensor:
    """float64 x, each row rounded to the nearest e4m3 times the scale that maps its largest value to 448."""
    scale = (x.abs().amax(-1, keepdim=True) / 448).float().double().clamp_min(2.0**-126)
    exponent = (x / scale).abs().clamp_min(2.0**-6).log2().floor()
    step = scale * 2.0 ** (exponent - 3)
    return (x / step).round() * step


class RoundingCache(DynamicCache):
    """Keeps rounded keys and values; a prompt attends to its own as they are."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        first = not self.get_seq_length(layer_idx)
        kept = super().update(rounded(key_states), rounded(value_states), layer_idx, *args, **kwargs)
        return (key_states, value_states) if first else kept


def logits_in_float64(model: Any, cache: DynamicCache, prompt: list[int], following: list[int]) -> Tensor:
    """(len(following), vocab): those of the token after the prompt, and after each following id but the last."""
    found, ids = [], [prompt, *([i] for i in following[:-1])]
    with torch.no_grad():
        for new in ids:
            found.append(model(torch.tensor([new]), past_key_values=cache, use_cache=True).logits[0, -1])
    return torch.stack(found)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any, Any]]:
    """A model's directory, and in float64 the model itself and the one with rounded matrices."""
    found = {}
    for name, kind in {"opt": OPTForCausalLM, "llama": LlamaForCausalLM}.items():
        torch.manual_seed(1)
        directory = tmp_path_factory.mktemp("models") / name
        kind(CONFIGS[name]).save_pretrained(directory)
        exact, coded = (kind.from_pretrained(directory, dtype=torch.float64).eval() for _ in range(2))
        with torch.no_grad():
            for key, weight in coded.named_parameters():
                if weight.dim() == 2 and "embed_positions" not in key:
                    weight.copy_(rounded(weight))
        found[name] = directory, exact, coded
    return found


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def fp8(percents: tuple[int, int, int]) -> dict[str, Any]:
    return {tier: {"percent": n, "codec": "fp8"} for tier, n in zip(Tier, percents, strict=True)}


PERCENTS = st.sampled_from([(34, 33, 33), (0, 50, 50), (100, 0, 0), (0, 100, 0), (0, 0, 100)])


@pytest.mark.parametrize("device", ["cpu", "emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(sorted(CONFIGS)),
    weights=PERCENTS,
    cache=PERCENTS,
    attend_on=st.sampled_from(["cpu", "gpu"]),
    sep_layer=st.booleans(),
)
def test_logits_are_those_of_rounded_values_in_float64(
    saved: Any,
    name: str,
    device: str,
    weights: tuple[int, int, int],
    cache: tuple[int, int, int],
    attend_on: str,
    sep_layer: bool,
) -> None:
    directory, exact, coded = saved[name]
    policy = Policy(
        gpu_batch_size=3, weights=fp8(weights), cache=fp8(cache), attend_on=attend_on, sep_layer=sep_layer
    )
    drawn: list[Tensor] = []
    choose = flexgen.runtime.choice.sample

    def watched(logits: Tensor, *args: Any, **options: Any) -> Any:
        drawn.append(logits.double().cpu())
        return choose(logits, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flexgen.runtime.choice, "sample", watched)
        with OptLM(directory, policy, device=device, dtype="float32", progress=False) as lm:
            ids = lm.generate(PROMPTS, TOKENS, stop=())
    ours = torch.stack(drawn)  # (tokens, rows, vocab)
    for row, prompt in enumerate(PROMPTS):
        following = ids[row, -TOKENS:].tolist()
        wanted = logits_in_float64(coded, RoundingCache(), prompt, following)
        assert distance(ours[0, row], wanted[0]) < 1e-5, "a prompt attends to itself as it is"
        # A key that differs in its last bit may get the next code, which is up to an eighth away.
        assert distance(ours[:, row], wanted) < 0.01
        plain = logits_in_float64(exact, DynamicCache(), prompt, following)
        assert distance(ours[:, row], plain) < 4 * 2**-4, (
            "of weights and cache in two layers, each rounded by 2 ** -4"
        )


def test_encoded_weights_in_an_offload_directory_are_used_again(saved: Any, tmp_path: Path) -> None:
    directory, _, _ = saved["llama"]
    found, written = [], []
    for device in ("cpu", "emulated"):
        policy = Policy(gpu_batch_size=3, weights=fp8((0, 0, 100)))
        with OptLM(directory, policy, device=device, dtype="float32", offload_dir=tmp_path) as lm:
            found.append(lm.generate(PROMPTS, TOKENS, stop=()))
        written.append({path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")})
    assert written[0] and written[0] == written[1]
    np.testing.assert_array_equal(*found)
