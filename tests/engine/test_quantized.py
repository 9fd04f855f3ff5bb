"""Checkpoints in quantized formats, opened with policies without and with codecs: the ids and logits are those of
transformers with the dequantized model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantized_checkpoints import FORMATS, save_gpt_oss, save_quantized, tiny
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from flexgen.engine.model import OptLM
from flexgen.errors import LaneError, PolicyError
from flexgen.layout.topology import LINKED
from flexgen.layout.weights import weight_layouts
from flexgen.models import build_layers, open_model
from flexgen.policy import Policy, Tier

ALL_CPU: dict[str, Any] = dict(weights={"cpu": 100}, cache={"cpu": 100}, activations={"cpu": 100})
ALL_DISK: dict[str, Any] = dict(weights={"disk": 100}, cache={"cpu": 100}, activations={"cpu": 100})
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen3_moe": dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=32),
}
DEVICES = ["emulated", pytest.param("cuda", marks=pytest.mark.gpu)]
MXFP4 = "mxfp4 of gpt-oss"
LENGTHS = [3, 7, 5, 9]
Saved = Callable[[str, str], tuple[Path, PreTrainedModel]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """`saved("awq", "qwen3")`: a checkpoint in that format, and the model with the rounded weights."""
    made: dict[tuple[str, str], tuple[Path, PreTrainedModel]] = {}

    def get(form: str, family: str) -> tuple[Path, PreTrainedModel]:
        if (form, family) not in made:
            directory = tmp_path_factory.mktemp("quantized")
            if form == MXFP4:
                model = tiny("gpt_oss", num_local_experts=5, num_experts_per_tok=2, sliding_window=4)
                save_gpt_oss(model, directory)
            else:
                model = tiny(family, **MODELS[family])
                save_quantized(model, FORMATS[form], directory)
            made[form, family] = directory, model
        return made[form, family]

    return get


def greedy(model: PreTrainedModel, prompts: list[list[int]], tokens: int) -> np.ndarray:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    with torch.no_grad():
        out = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return out[:, -tokens:].numpy()


def check(saved: tuple[Path, PreTrainedModel], policy: Policy, device: str, given: list[list[int]]) -> None:
    directory, model = saved
    with OptLM(directory, policy, device=device, progress=False) as lm:
        ours = lm.generate(given, 8, stop=())
    np.testing.assert_array_equal(ours[:, -8:], greedy(model, given, 8))


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("form", FORMATS)
def test_every_weight_is_that_of_the_dequantized_model(form: str, family: str, saved: Saved) -> None:
    directory, model = saved(form, family)
    spec, files = open_model(directory)
    plain: dict[str, Tensor] = dict(model.state_dict())
    for layer in build_layers(spec):
        for weight in layer.weights:
            expected = plain.get(weight.key)
            if expected is None:  # of an expert
                prefix, number, module, _ = weight.key.rsplit(".", 3)
                stack = plain[f"{prefix}.down_proj" if module == "down_proj" else f"{prefix}.gate_up_proj"]
                expected = stack[int(number)]
                if module != "down_proj":
                    expected = expected.chunk(2)[module == "up_proj"]
            torch.testing.assert_close(files.read(weight, torch.float32), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", [*FORMATS, MXFP4])
def test_logits(form: str, saved: Saved, prompts: Any) -> None:
    directory, model = saved(form, "qwen3")
    (prompt,) = prompts([9])
    with OptLM(directory, Policy(**ALL_CPU), device="cpu", progress=False) as lm:
        found = lm.forward([prompt])
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", [*FORMATS, MXFP4])
def test_greedy_ids_with_parts_on_all_tiers(form: str, saved: Saved, prompts: Any, mixed: Any) -> None:
    check(saved(form, "qwen3_moe"), mixed(gpu_batch_size=2), "emulated", prompts(LENGTHS))


def stored(policy: Policy) -> Policy:
    """The policy with the codec "stored" on all tiers."""
    shares = {str(tier): dict(percent=policy.weights.percent(tier), codec="stored") for tier in Tier}
    return policy.replace(weights=shares)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", [*FORMATS, MXFP4])
def test_greedy_ids_of_stored_weights(form: str, device: str, saved: Saved, prompts: Any, mixed: Any) -> None:
    check(saved(form, "qwen3_moe"), stored(mixed(gpu_batch_size=2)), device, prompts(LENGTHS))


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("form", ["fp8 in blocks", "awq", MXFP4])
def test_greedy_ids_of_stored_weights_in_whole_layers(
    form: str, device: str, saved: Saved, prompts: Any, mixed: Any
) -> None:
    policy = stored(mixed(gpu_batch_size=2, sep_layer=False))
    check(saved(form, "qwen3_moe"), policy, device, prompts(LENGTHS))


@pytest.mark.parametrize("form", [*FORMATS, MXFP4])
def test_stored_weights_keep_the_bytes_of_the_file(
    form: str, saved: Saved, prompts: Any, tmp_path: Path
) -> None:
    """On disk they are read in place, and no other file is written. In memory they have the same size."""
    directory, _ = saved(form, "qwen3_moe")
    spec, files = open_model(directory)
    parts = [part for each in spec.encoded.values() for part in each.parts]
    assert len(spec.encoded) > 10
    quantized = sum(part.nbytes(torch.float32) for part in parts)
    for tier in ("cpu", "disk"):
        weights = {tier: dict(percent=100, codec="stored")}
        policy = Policy(gpu_batch_size=4, **ALL_CPU | dict(weights=weights))
        with OptLM(directory, policy, device="emulated", offload_dir=tmp_path, progress=False) as lm:
            plain = [w for layer in build_layers(spec) for w in layer.weights if w.key not in spec.encoded]
            # Embedding and head are plain, and may be tied.
            rest = sum({w.key: w.nbytes(torch.float32) for w in plain}.values())
            assert lm.placement.nbytes[Tier(tier)] == quantized + rest
            assert lm.placement.stored.keys() == spec.encoded.keys()
            if tier == "cpu":  # in files, other tensors may be in between
                layouts = weight_layouts(lm._layers, lm.placement, LINKED)
                assert [each.runs for each in lm._model.weights.layouts] == [each.runs for each in layouts]
            lm.generate(prompts(LENGTHS), 2, stop=())
        assert not list(tmp_path.rglob("*.safetensors"))


def test_stored_parts_of_a_bin_file_are_written_once(saved: Saved, prompts: Any, tmp_path: Path) -> None:
    """Tensors of a pickle cannot be read in place. The file also has an odd number of bytes of codes."""
    directory, model = saved("fp8 in blocks", "qwen3")
    other, offload = tmp_path / "bin", tmp_path / "offload"
    shutil.copytree(directory, other, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(directory / "model.safetensors"), other / "pytorch_model.bin")
    policy, given = stored(Policy(gpu_batch_size=4, **ALL_DISK)), prompts(LENGTHS)
    with OptLM(other, policy, device="cpu", offload_dir=offload, progress=False) as lm:
        ours = lm.generate(given, 8, stop=())
    np.testing.assert_array_equal(ours[:, -8:], greedy(model, given, 8))


@pytest.mark.parametrize("codec", ["none", "int8", "stored"])
def test_a_plain_checkpoint_has_nothing_stored(codec: str, prompts: Any, tmp_path: Path) -> None:
    tiny("qwen3").save_pretrained(tmp_path)
    weights = {"cpu": dict(percent=100, codec=codec)}
    with OptLM(tmp_path, Policy(**ALL_CPU | dict(weights=weights)), device="cpu", progress=False) as lm:
        assert not lm.placement.stored
        assert bool(lm.placement.codecs) == (codec == "int8")


@pytest.mark.parametrize(
    ("form", "suffix", "nan"),
    [("fp8 in blocks", "weight", 0x7F), ("mxfp4 pack", "weight_scale", 0xFF)],
)
def test_values_on_disk_that_are_not_finite(
    form: str, suffix: str, nan: int, prompts: Any, tmp_path: Path
) -> None:
    """Weights that are read in place are checked when they are first read."""
    save_quantized(tiny("qwen3"), FORMATS[form], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"model.layers.1.mlp.up_proj.{suffix}"].view(torch.uint8)[5, 1] = nan
    save_file(tensors, tmp_path / "model.safetensors")
    policy, match = stored(Policy(**ALL_DISK)), f"up_proj.{suffix}.* contains NaN or infinite values"
    with (
        OptLM(tmp_path, policy, device="cpu", progress=False) as lm,
        pytest.raises(LaneError, match=match),
    ):
        lm.generate(prompts([3]), 2, stop=())


def test_a_cache_cannot_be_stored(saved: Saved) -> None:
    directory, _ = saved("awq", "qwen3")
    policy = Policy(**ALL_CPU | dict(cache={"cpu": dict(percent=100, codec="stored")}))
    with pytest.raises(PolicyError, match="'stored' is the form of a checkpoint's weights"):
        OptLM(directory, policy, device="cpu", progress=False)


@pytest.mark.parametrize("policy", [ALL_CPU, ALL_DISK], ids=["cpu", "disk"])
@pytest.mark.parametrize("form", ["fp8 in blocks", "int4 pack, zero points", MXFP4])
def test_greedy_ids_on_a_cpu(form: str, policy: dict[str, Any], saved: Saved, prompts: Any) -> None:
    check(saved(form, "qwen3_moe"), Policy(gpu_batch_size=4, **policy), "cpu", prompts(LENGTHS))


@pytest.mark.parametrize("form", ["fp8 in blocks", "awq"])
def test_a_codec_rounds_the_dequantized_weights(
    form: str, saved: Saved, prompts: Any, tmp_path: Path
) -> None:
    """The same ids as those of the dequantized model, saved plainly and opened with the codec."""
    directory, model = saved(form, "qwen3")
    model.save_pretrained(tmp_path)
    coded = ALL_CPU | dict(weights={"cpu": dict(percent=100, codec="int8")})
    made = []
    for each in (directory, tmp_path):
        with OptLM(each, Policy(gpu_batch_size=4, **coded), device="cpu", progress=False) as lm:
            made.append(lm.generate(prompts(LENGTHS), 8, stop=()))
    np.testing.assert_array_equal(*made)


@pytest.mark.parametrize("options", [ALL_CPU, ALL_DISK], ids=["memory", "disk"])
def test_dummy_weights_in_the_published_format(options: dict[str, Any], prompts: Any, tmp_path: Path) -> None:
    config = tiny("gpt_oss", num_local_experts=5, num_experts_per_tok=2).config
    config.quantization_config = dict(quant_method="mxfp4")
    with OptLM(
        config, stored(Policy(**options)), weights="dummy", device="cpu", offload_dir=tmp_path, progress=False
    ) as lm:
        assert len(lm.placement.stored) == 2 * 5 * 2, "the matrices of all experts of two layers"
        first, again = (lm.generate(prompts([3, 5]), 4, stop=()) for _ in range(2))
    np.testing.assert_array_equal(first, again)
