"""Encoded weights: the engine computes exactly what the decoded weights give, wherever they live."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from flexgen import OptLM, Policy
from flexgen.kernels.groupwise_linear import GroupwiseMatrix
from flexgen.kernels.quantized import QuantizedMatrix
from flexgen.policy import Tier
from flexgen.quant import CODECS, codec_for
from flexgen.quant.groupwise import RoundedGroupwise

EXACT = sorted(name for name, codec in CODECS.items() if not isinstance(codec, RoundedGroupwise))
ROUNDING = sorted(set(CODECS) - set(EXACT))
SIZES = dict(
    vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=48
)
CONFIGS = {
    "opt": OPTConfig(**SIZES, ffn_dim=128, word_embed_proj_dim=64, init_std=0.3, pad_token_id=1),
    "llama": LlamaConfig(**SIZES, intermediate_size=128, num_key_value_heads=2, initializer_range=0.3),
}
PROMPTS = [[5, 6, 7, 8, 9], [11, 12], [13, 14, 15]]


def split(codec: str, **percent: float) -> dict[str, Any]:
    return {tier: {"percent": value, "codec": codec} for tier, value in percent.items()}


@pytest.fixture(params=sorted(CONFIGS))
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Any]:
    """A model's directory, and the same model in transformers."""
    torch.manual_seed(0)
    kind = {"opt": OPTForCausalLM, "llama": LlamaForCausalLM}[request.param]
    model = kind(CONFIGS[request.param]).eval()
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model", model


def rounded(model: Any, codec: str) -> Any:
    """The model with every matrix that is encoded replaced by what decoding gives."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            found = codec_for(codec, weight.shape)
            if found and "embed_positions" not in name:
                out = torch.empty_like(weight)
                found.decode(found.encode(weight), out)
                weight.copy_(out)
    return model


def greedy(model: Any, tokens: int) -> list[list[int]]:
    answers = []
    for prompt in PROMPTS:
        with torch.no_grad():
            ids = model.generate(
                torch.tensor([prompt]),
                max_new_tokens=tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        answers.append(ids[0, len(prompt) :].tolist())
    return answers


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("codec", EXACT)
@pytest.mark.parametrize("sep_layer", [True, False])
def test_greedy_ids_are_those_of_the_rounded_model(
    saved: tuple[Path, Any], codec: str, device: str, sep_layer: bool
) -> None:
    directory, model = saved
    expected = greedy(rounded(model, codec), 6)
    weights = split(codec, gpu=30, cpu=30, disk=40)
    policy = Policy(gpu_batch_size=2, num_gpu_batches=2, weights=weights, sep_layer=sep_layer)
    with OptLM(directory, policy, device=device, dtype="float32") as lm:
        ids = lm.generate(PROMPTS, 6, stop=())
        assert [row[-6:].tolist() for row in ids] == expected
        assert all(lm.placement.nbytes.values())
        again = lm.generate(PROMPTS, 6, stop=())
        np.testing.assert_array_equal(again, ids)


def test_a_codec_for_each_tier(saved: tuple[Path, Any], tmp_path: Path) -> None:
    directory, _ = saved
    weights = {"cpu": {"percent": 50, "codec": "int8"}, "disk": {"percent": 50, "codec": "int4"}}
    offload = tmp_path / "offload"
    with OptLM(directory, Policy(weights=weights), device="cpu", dtype="float32", offload_dir=offload) as lm:
        names = {codec.name for codec in lm.placement.codecs.values()}
        assert names == {"int8", "int4"}
        for key, codec in lm.placement.codecs.items():
            assert codec.name == {Tier.CPU: "int8", Tier.DISK: "int4"}[lm.placement.tiers[key]]
        first = lm.generate(PROMPTS, 4, stop=())
    written = {path: path.stat().st_mtime_ns for path in offload.rglob("*.safetensors")}
    assert written, "encoded weights are kept for the next run"
    with OptLM(directory, Policy(weights=weights), device="cpu", dtype="float32", offload_dir=offload) as lm:
        np.testing.assert_array_equal(lm.generate(PROMPTS, 4, stop=()), first)
    assert {path: path.stat().st_mtime_ns for path in offload.rglob("*.safetensors")} == written


def test_percentages_are_about_the_model_and_bytes_about_what_is_kept() -> None:
    config = OPTConfig(
        hidden_size=256, ffn_dim=1024, num_hidden_layers=8, num_attention_heads=4, vocab_size=512
    )
    config.word_embed_proj_dim = 256
    policy = Policy(weights=split("int4", cpu=50, disk=50))
    with OptLM(config, policy, device="cpu", dtype="bfloat16", weights="dummy") as lm:
        assert lm.placement.percent[Tier.CPU] == pytest.approx(50, abs=5)
        matrices = sum(w.numel for layer in lm._layers for w in layer.weights if lm.placement.codec(w))
        encoded = sum(
            lm.placement.stored_bytes(w)
            for layer in lm._layers
            for w in layer.weights
            if lm.placement.codec(w)
        )
        assert encoded * 8 / matrices <= 4.6


EVERY, NONE = 10**9, 0
"""Rows up to which products take encoded weights as they are."""


def fuse_up_to(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QuantizedMatrix, "fused_rows", lambda matrix, dtype: rows)
    monkeypatch.setattr(GroupwiseMatrix, "fused_rows", lambda matrix, dtype: rows)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of the matrices that were decoded, in order."""
    shapes: list[torch.Size] = []
    codec = CODECS["int4"]
    original = type(codec).decode
    monkeypatch.setattr(
        type(codec), "decode", lambda *args: (shapes.append(args[2].shape), original(*args))[1]
    )
    return shapes


def multiplied(lm: OptLM) -> list[list[torch.Size]]:
    """For each layer, the shapes of the encoded matrices that are multiplied."""
    return [
        [torch.Size(w.shape) for w in layer.weights if lm.placement.codec(w) and not w.looked_up]
        for layer in lm._layers
    ]


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_decoding_happens_once_for_all_batches_of_a_visit(
    device: str, saved: tuple[Path, Any], decoded: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if two layers are computed alternately, as with attention on the host."""
    directory, model = saved
    expected = greedy(rounded(model, "int4"), 4)
    decoded.clear()
    fuse_up_to(NONE, monkeypatch)
    policy = Policy(
        gpu_batch_size=1,
        num_gpu_batches=3,
        weights=split("int4", cpu=100),
        cache={"cpu": 100},
        sep_layer=False,
    )
    with OptLM(directory, policy, device=device, dtype="float32") as lm:
        every_visit = 4 * [shape for shapes in multiplied(lm) for shape in shapes]
        ids = lm.generate(PROMPTS, 4, stop=())
        assert lm.stats is not None
        assert lm.stats.order == {"cpu": "overlap_multi_batch", "emulated": "overlap_cpu_attention"}[device]
    assert [row[-4:].tolist() for row in ids] == expected
    whole = [
        shape for shape in decoded if shape in every_visit
    ]  # off the device, looked up rows are decoded too
    assert sorted(whole) == sorted(every_visit), "the table's rows are looked up, it is never decoded"


def test_only_products_of_many_rows_decode(
    saved: tuple[Path, Any], decoded: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prefill has rows times tokens, but its head, like every later token, only rows."""
    directory, _ = saved
    fuse_up_to(3, monkeypatch)
    with OptLM(directory, Policy(gpu_batch_size=3, weights=split("int4", cpu=100)), device="cpu") as lm:
        *before, head = multiplied(lm)
        lm.generate(PROMPTS, 3, stop=())
        assert head and sorted(decoded) == sorted(shape for shapes in before for shape in shapes)
        decoded.clear()
        lm.forward(PROMPTS)  # logits of every position: the head has many rows too
        assert sorted(decoded) == sorted(shape for shapes in [*before, head] for shape in shapes)


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("rows", [NONE, 3, EVERY])
def test_ids_are_the_same_whatever_is_decoded(
    saved: tuple[Path, Any], rows: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers share slots and the place that they are decoded to, so what an earlier visit left must not be used."""
    directory, model = saved
    expected = greedy(rounded(model, "int4"), 6)
    fuse_up_to(rows, monkeypatch)
    for batch, batches in ((1, 1), (1, 3), (2, 2)):
        policy = Policy(gpu_batch_size=batch, num_gpu_batches=batches, weights=split("int4", cpu=50, disk=50))
        with OptLM(directory, policy, device=device, dtype="float32") as lm:
            ids = lm.generate(PROMPTS, 6, stop=())
        assert [row[-6:].tolist() for row in ids] == expected


@pytest.mark.parametrize("codec", EXACT)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_logits_are_the_same_within_rounding(
    saved: tuple[Path, Any], codec: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, model = saved
    with torch.no_grad():
        # What is encoded are the checkpoint's weights in the dtype that is computed in.
        exact = rounded(model.to(getattr(torch, dtype)).float(), codec)(torch.tensor([PROMPTS[0]])).logits
    unit = torch.finfo(getattr(torch, dtype)).eps
    for rows in (NONE, EVERY):
        fuse_up_to(rows, monkeypatch)
        with OptLM(directory, Policy(weights=split(codec, cpu=100)), device="cpu", dtype=dtype) as lm:
            logits = lm.forward(PROMPTS[:1])
        # A few roundings of hidden states, and of the weights where they are decoded; sums in another order.
        assert (logits.float() - exact).abs().max() <= 8 * unit * exact.abs().max() + 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("codec", ROUNDING)
def test_codecs_that_round_activations_store_the_same_and_differ_in_products(
    saved: tuple[Path, Any], codec: str, dtype: str
) -> None:
    directory, _ = saved
    logits, nbytes = [], []
    for name in (codec, codec.removesuffix("_a8")):
        with OptLM(directory, Policy(weights=split(name, cpu=100)), device="cpu", dtype=dtype) as lm:
            logits.append(lm.forward(PROMPTS[:1]).float())
            nbytes.append(lm.placement.nbytes)
    difference = (logits[0] - logits[1]).norm() / logits[1].norm()
    assert nbytes[0] == nbytes[1]
    assert 0 < difference < 0.1
