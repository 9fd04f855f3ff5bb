"""Families that differ in structure, generated with part of each class on each tier: the ids are transformers'.

tests/models/families/test_tables.py holds every family's layers against transformers.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_families import COUNT_PADDING, TINY, random_model
from transformers import CONFIG_MAPPING, PreTrainedModel

from flexgen.engine.model import OptLM
from flexgen.models import ModelSpec, WeightSpec, build_layers, open_model
from flexgen.policy import Policy
from flexgen.quant import codec_for
from flexgen.schedule.orders import ORDERS

DEVICES = ["cpu", "emulated", pytest.param("cuda", marks=pytest.mark.gpu)]
LENGTHS = [3, 7, 5, 9, 2, 6, 4, 8]
STRUCTURES = {
    "fused rows and gate_up, partial rope": ("phi3", 1),
    "parallel, one norm": ("phi", 1),
    "parallel, two norms, fused heads": ("gpt_neox", 0),
    "transposed": ("gpt2", 0),
    "layers that differ, norms after, heads' norms": ("exaone4", 1),
    "fused groups": ("falcon", 0),
    "scales": ("granite", 0),
    "experts, a shared one with a gate, dense layers": ("qwen2_moe", 1),
    "experts in groups, correction in float32": ("glm4_moe", 0),
    "parallel, experts and a dense layer": ("cohere2_moe", 0),
    "windows, caps": ("gemma2", 0),
    "windows, heads' norms": ("gemma3_text", 0),
    "windows in all layers": ("mistral", 1),
    "ALiBi, norm of embeddings": ("bloom", 1),
    "sinks, clamped experts": ("gpt_oss", 0),
    "gated attention, norms around a mixture": ("afmoe", 0),
    "chunks, experts with weighted inputs": ("llama4_text", 0),
    "heads of two sizes, an MLP next to the experts": ("gemma4_text", 0),
    "values narrower than keys, sinks": ("mimo_v2_flash", 0),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], tuple[Path, PreTrainedModel]]:
    """`saved("phi3", 1)`: a directory with the second of a family's tiny models, and that model."""
    made: dict[tuple[str, int], tuple[Path, PreTrainedModel]] = {}

    def get(family: str, number: int) -> tuple[Path, PreTrainedModel]:
        if (family, number) not in made:
            config = CONFIG_MAPPING[family](**copy.deepcopy(TINY[family][number]))
            model, directory = random_model(config), tmp_path_factory.mktemp(family)
            model.save_pretrained(directory)
            made[family, number] = directory, model
        return made[family, number]

    return get


def _greedy(model: PreTrainedModel, prompts: list[list[int]], tokens: int, pad: int) -> np.ndarray:
    width = max(map(len, prompts))
    if model.config.model_type in COUNT_PADDING and len(prompts) > 1:
        rows = [_greedy(model, [prompt], tokens, pad)[0] for prompt in prompts]
        return np.stack([np.pad(row, (width + tokens - len(row), 0), constant_values=pad) for row in rows])
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=pad
        )
    return out.numpy()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", TINY)
def test_greedy_ids(family: str, device: str, saved: Any, prompts: Any, mixed: Any) -> None:
    directory, model = saved(family, 0)
    given = prompts(LENGTHS[:4])
    policy = mixed(gpu_batch_size=2)
    with OptLM(directory, policy, device=device, progress=False) as lm:
        ours = lm.generate(given, 8, stop=())
        pad = lm.spec.pad_token_id or 0
    theirs = _greedy(model, given, 8, pad)
    np.testing.assert_array_equal(ours[:, -8:], theirs[:, -8:])


@pytest.mark.gpu
@pytest.mark.parametrize("family", TINY)
def test_greedy_ids_with_everything_on_the_gpu(family: str, saved: Any, prompts: Any) -> None:
    """Decode steps are replayed as CUDA graphs."""
    directory, model = saved(family, len(TINY[family]) - 1)
    given, resident = prompts(LENGTHS[:4]), {"gpu": 100}
    policy = Policy(gpu_batch_size=4, weights=resident, cache=resident, activations=resident)
    with OptLM(directory, policy, device="cuda", progress=False) as lm:
        ours = lm.generate(given, 14, stop=())
        pad = lm.spec.pad_token_id or 0
    np.testing.assert_array_equal(ours[:, -14:], _greedy(model, given, 14, pad)[:, -14:])


@pytest.mark.parametrize("attend_on", ["cpu", "gpu"])
@pytest.mark.parametrize("sep_layer", [True, False])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_layers_and_places_of_attention(
    structure: str, sep_layer: bool, attend_on: str, saved: Any, prompts: Any, mixed: Any
) -> None:
    directory, model = saved(*STRUCTURES[structure])
    given = prompts(LENGTHS)
    policy = mixed(sep_layer=sep_layer, attend_on=attend_on)
    with OptLM(directory, policy, device="emulated", progress=False) as lm:
        ours = lm.generate(given, 10, stop=())
        assert all(lm.placement.nbytes.values()), "a tier without weights would prove less"
        pad = lm.spec.pad_token_id or 0
    np.testing.assert_array_equal(ours[:, -10:], _greedy(model, given, 10, pad)[:, -10:])


MIXTURES_AND_WINDOWS = [
    name
    for name in STRUCTURES
    if {"experts", "windows", "mixture", "chunks", "sinks"} & set(re.split(r"\W+", name))
]


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("structure", MIXTURES_AND_WINDOWS)
def test_every_order_with_mixtures_and_windows(
    structure: str, device: str, saved: Any, prompts: Any, mixed: Any
) -> None:
    directory, model = saved(*STRUCTURES[structure])
    given, ids = prompts(LENGTHS), {}
    for order in ORDERS:
        with OptLM(directory, mixed(), device=device, order=order, progress=False) as lm:
            ids[order] = lm.generate(given, 10, stop=())[:, -10:]
            pad = lm.spec.pad_token_id or 0
    expected = _greedy(model, given, 10, pad)[:, -10:]
    for order, found in ids.items():
        np.testing.assert_array_equal(found, expected, err_msg=order)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_int4_ids_are_those_of_the_rounded_model(structure: str, prompts: Any, tmp_path: Path) -> None:
    """Fused and transposed matrices are encoded as they are multiplied."""
    family, number = STRUCTURES[structure]
    fields = TINY[family][number]
    wide = dict(n_embd=64) if "n_embd" in fields else dict(hidden_size=64)
    widths = {field for field in fields if field.endswith("intermediate_size")}
    wide |= dict.fromkeys(widths, 128)
    model = random_model(CONFIG_MAPPING[family](**copy.deepcopy(fields) | wide))
    model.save_pretrained(tmp_path)
    spec, _ = open_model(tmp_path)
    given = prompts(LENGTHS)
    weights = {
        tier: {"percent": share, "codec": "int4"} for tier, share in dict(gpu=34, cpu=33, disk=33).items()
    }
    policy = Policy(gpu_batch_size=3, num_gpu_batches=3, weights=weights)
    with OptLM(tmp_path, policy, device="emulated", progress=False) as lm:
        ours = lm.generate(given, 8, stop=())
        assert {codec.name for codec in lm.placement.codecs.values()} == {"int4"}
    theirs = _greedy(_rounded(model, spec), given, 8, spec.pad_token_id or 0)
    np.testing.assert_array_equal(ours[:, -8:], theirs[:, -8:])


def _rounded(model: PreTrainedModel, spec: ModelSpec) -> PreTrainedModel:
    """The model with every matrix that is encoded in int4 replaced by what decoding gives."""
    stored = model.state_dict(keep_vars=True)
    weights = {weight.key: weight for layer in build_layers(spec) for weight in layer.weights}.values()
    with torch.no_grad():
        for weight in weights:
            codec = codec_for("int4", weight.shape) if weight.encodable else None
            if codec is not None:
                tensor = _part_of(stored, weight)
                matrix = (tensor.T if weight.transposed else tensor).contiguous()
                out = torch.empty_like(matrix)
                codec.decode(codec.encode(matrix), out)
                tensor.copy_(out.T if weight.transposed else out)
    return model


def _part_of(stored: dict[str, torch.Tensor], weight: WeightSpec) -> torch.Tensor:
    """A view of the weight in the tensors of a model."""
    source = next(source for source in weight.sources if source.name in stored)
    tensor = stored[source.name]
    if not source.take:
        return tensor
    shape = weight.shape[::-1] if weight.transposed else weight.shape
    return tensor.data.view(-1)[source.skipped :][: weight.numel].view(shape)


@pytest.mark.parametrize("family", ["gpt2", "cohere"])
def test_weights_that_files_store_in_another_shape_are_read_whole_or_by_rows(
    family: str, saved: Any, tmp_path: Path
) -> None:
    directory, model = saved(family, len(TINY[family]) - 1)
    spec, files = open_model(directory)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    model.config.save_pretrained(tmp_path)
    _, pickled = open_model(tmp_path)
    other = [w for layer in build_layers(spec) for w in layer.weights if w.shape_in(w.sources[0]) != w.shape]
    assert other
    for weight in other:
        whole = files.read(weight, torch.float32)
        stored = model.state_dict()[weight.key]
        assert whole.shape == weight.shape and whole.is_contiguous()
        assert torch.equal(whole, stored.T if weight.transposed else stored.view(weight.shape))
        assert torch.equal(pickled.read(weight, torch.float32), whole)
        for checkpoint in (files, pickled):
            assert torch.equal(checkpoint.read(weight, torch.float32, range(3, 7)), whole[3:7])
        assert (files.extent(weight) is None) == weight.transposed


@pytest.mark.parametrize("family", ["mixtral", "granitemoe", "qwen3_moe", "minimax_m2"])
def test_experts_are_read_from_stacks_and_from_tensors_of_their_own(
    family: str, saved: Any, prompts: Any, mixed: Any, tmp_path: Path
) -> None:
    """What the hub has, and what transformers has in memory."""
    published, model = saved(family, 0)
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    layouts = [open_model(directory)[1] for directory in (published, tmp_path / "stacked")]
    spec, _ = open_model(published)
    experts = [w for layer in build_layers(spec) for w in layer.weights if "experts." in w.name]
    given, ids = prompts(LENGTHS[:3]), []
    for weight in experts[:: len(experts) // 20]:
        first, second = (files.read(weight, torch.float32) for files in layouts)
        assert torch.equal(first, second) and torch.equal(first, _part_of(dict(model.state_dict()), weight))
        assert torch.equal(layouts[1].read(weight, torch.float32, range(3, 7)), first[3:7])
        extent = layouts[1].extent(weight)
        assert extent is not None and extent.nbytes == first.nbytes
    for directory in (published, tmp_path / "stacked"):
        with OptLM(directory, mixed(gpu_batch_size=2), device="emulated", progress=False) as lm:
            ids.append(lm.generate(given, 6, stop=()))
    np.testing.assert_array_equal(*ids)
