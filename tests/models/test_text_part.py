"""Text parts of multimodal checkpoints: logits of transformers' multimodal models, names, fields, and files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from multimodal import MULTIMODAL, multimodal_config, multimodal_model
from safetensors.torch import load_file, save_file

from flexgen.errors import CheckpointError, ModelError
from flexgen.models import build_layers, open_model
from flexgen.models.families import config_from_dict, spec_from_config
from flexgen.models.text_part import text_tensors

IDS = torch.randint(4, 60, (4, 14), generator=torch.Generator().manual_seed(1))
LAYOUTS = ["language_model.model.", "model.language_model.", "language_model.", "model.language_model.model."]


@pytest.fixture
def gemma3(tmp_path: Path) -> Path:
    """A directory with a tiny Gemma 3 that reads images."""
    multimodal_model(multimodal_config("gemma3", "gemma3_text", 0)).save_pretrained(tmp_path / "gemma3")
    return tmp_path / "gemma3"


@pytest.fixture
def changed(tmp_path: Path) -> Any:
    """`changed(values, eos_token_id=5)`: the spec of a config.json with these values and changes."""

    def read(values: dict[str, Any], **changes: Any) -> Any:
        return spec_from_config(config_from_dict(values | changes, "mine"), "mine")

    return read


@pytest.mark.parametrize("model_type", MULTIMODAL)
def test_logits_equal_those_of_the_multimodal_model(model_type: str, tmp_path: Path, runner: Any) -> None:
    model = multimodal_model(multimodal_config(model_type, *MULTIMODAL[model_type]))
    model.save_pretrained(tmp_path)
    theirs = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    assert theirs.std() > 0.1
    opened = runner(tmp_path, torch.float32)
    torch.testing.assert_close(opened.full(IDS, [0] * len(IDS)), theirs, rtol=0, atol=1e-4)
    assert opened.spec.family == MULTIMODAL[model_type][0]


@pytest.mark.parametrize("prefix", LAYOUTS)
@pytest.mark.parametrize("head", ["lm_head.weight", "language_model.lm_head.weight"])
def test_every_layout_of_names_opens(prefix: str, head: str, tmp_path: Path, runner: Any) -> None:
    model = multimodal_model(multimodal_config("llava", "llama", 0))
    theirs = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    renamed = {
        name.replace("language_model.model.", prefix) if "lm_head" not in name else head: tensor
        for name, tensor in load_file(file).items()
    }
    save_file(renamed, file)
    ours = runner(tmp_path, torch.float32).full(IDS, [0] * len(IDS))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_names_of_a_text_model_do_not_change() -> None:
    names = ["model.layers.0.mlp.up_proj.weight", "lm_head.weight", "mtp.norm.weight"]
    assert list(text_tensors(dict.fromkeys(names))) == names


def test_files_without_text_tensors_are_not_used(gemma3: Path) -> None:
    """A shard with nothing but vision is no source: it is not part of the identity of the model's weights."""
    file = gemma3 / "model.safetensors"
    tensors = load_file(file)
    text = {name: tensor for name, tensor in tensors.items() if "language_model" in name}
    vision = {name: tensor for name, tensor in tensors.items() if name not in text}
    assert vision
    save_file(text, gemma3 / "a.safetensors")
    save_file(vision | {"vision.qweight": torch.zeros(2, dtype=torch.int32)}, gemma3 / "b.safetensors")
    file.unlink()
    weight_map = dict.fromkeys(text, "a.safetensors") | dict.fromkeys(vision, "b.safetensors")
    (gemma3 / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    spec, checkpoint = open_model(gemma3)
    assert [path.name for path in checkpoint.sources] == ["a.safetensors"]
    weights = {weight.key: weight for layer in build_layers(spec) for weight in layer.weights}
    assert sum(weight.numel for weight in weights.values()) == sum(tensor.numel() for tensor in text.values())


def test_a_missing_text_tensor_is_named(gemma3: Path) -> None:
    file = gemma3 / "model.safetensors"
    tensors = load_file(file)
    del tensors["language_model.model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file)
    spec, checkpoint = open_model(gemma3)
    with pytest.raises(CheckpointError, match=r"1 tensor missing: .*layers\.1\.mlp\.up_proj\.weight"):
        checkpoint.verify(build_layers(spec))


def test_stop_ids_come_from_either_level(changed: Any) -> None:
    values = multimodal_config("gemma3", "gemma3_text", 0).to_dict()
    del values["text_config"]["eos_token_id"]
    assert changed(values, eos_token_id=[1, 6]).eos_token_ids == (1, 6)
    values["text_config"]["eos_token_id"] = 7
    assert changed(values).eos_token_ids == (7,)
    llava = multimodal_config("llava", "llama", 0, eos_token_id=[3, 4]).to_dict()
    assert changed(llava).eos_token_ids == (3, 4)
    assert changed(llava, eos_token_id=5).eos_token_ids == (5,)


def test_a_text_part_without_fields_has_the_defaults_of_the_multimodal_class(changed: Any) -> None:
    spec = changed({"model_type": "mistral3"})
    assert spec.family == "mistral" and spec.hidden_size == 5120


def test_an_untied_head_needs_no_field(tmp_path: Path) -> None:
    """Mistral 3.1 has a head of its own, and the default of its class is a tied one."""
    config = multimodal_config("mistral3", "mistral", 0)
    assert config.tie_word_embeddings
    config.tie_word_embeddings = False
    multimodal_model(config).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert not open_model(tmp_path)[0].tied_head


def test_a_dtype_comes_from_either_level(changed: Any) -> None:
    values = multimodal_config("llava", "llama", 0).to_dict()
    del values["dtype"], values["text_config"]["dtype"]
    assert changed(values, torch_dtype="bfloat16").dtype == torch.bfloat16
    values["text_config"]["torch_dtype"] = "float16"
    assert changed(values).dtype == torch.float16


@pytest.mark.parametrize(
    ("text", "outer", "message"),
    [
        (dict(mlp_kind="new"), {}, "mlp_kind = 'new' is not supported: no layer of this family uses it"),
        (dict(hidden_act="new"), {}, "hidden_act = 'new' is not supported"),
        (dict(hidden_size=-1), {}, "mine, text_config: hidden_size = -1 is not a size"),
        (dict(dtype="int7"), {}, "mine, text_config: dtype = 'int7' is not supported"),
        (dict(quantization_config=dict(quant_method="new")), {}, "quantization_config: 'new'"),
        ({}, dict(quantization_config=dict(quant_method="new")), "quantization_config: 'new'"),
        (dict(model_type="t5"), {}, "model_type = 't5' is not supported; supported: "),
        (dict(model_type="no such"), {}, "the config is invalid: .*no such"),
        ({}, dict(model_type="no such"), "model_type = 'no such' is not supported; supported: "),
        ({}, dict(text_config=7), "the config is invalid"),
    ],
)
def test_what_a_text_part_asks_for_is_checked(
    text: dict[str, Any], outer: dict[str, Any], message: str, changed: Any
) -> None:
    values = multimodal_config("llava", "llama", 0).to_dict()
    values["text_config"] = values["text_config"] | text
    with pytest.raises(ModelError, match=message):
        changed(values, **outer)


def test_a_prefix_language_model_is_refused() -> None:
    """PaliGemma's prompts attend in both directions."""
    with pytest.raises(ModelError, match="use_bidirectional_attention = True"):
        spec_from_config(multimodal_config("paligemma", "gemma", 0), "mine")


def test_a_text_model_of_another_kind_is_refused_by_its_name() -> None:
    with pytest.raises(ModelError, match="model_type = 'qwen2_vl_text' is not supported"):
        config = config_from_dict({"model_type": "qwen2_vl"}, "mine")
        spec_from_config(config, "mine")
