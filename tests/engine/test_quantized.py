"""Checkpoints in quantized formats, opened with policies without and with codecs: the ids and logits are those of
transformers with the dequantized model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantized_checkpoints import FORMATS, save_gpt_oss, save_quantized, tiny
from torch import Tensor
from transformers import PreTrainedModel

from flexgen.engine.model import OptLM
from flexgen.models import build_layers, open_model
from flexgen.policy import Policy

ALL_CPU: dict[str, Any] = dict(weights={"cpu": 100}, cache={"cpu": 100}, activations={"cpu": 100})
ALL_DISK: dict[str, Any] = dict(weights={"disk": 100}, cache={"cpu": 100}, activations={"cpu": 100})
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen3_moe": dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=32),
}
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
