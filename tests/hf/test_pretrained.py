"""The methods and attributes of a `PreTrainedModel` that evaluation harnesses use."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, pipeline

from flexgen.errors import RequestError, UnsupportedError
from flexgen.hf.pretrained import _REASONS


def test_every_method_is_there_or_says_why_not(model: Any) -> None:
    public = [name for name, value in inspect.getmembers(PreTrainedModel, callable) if name[0] != "_"]
    assert {name for name in public if not hasattr(model, name)} <= {"T_destination"}  # a type variable
    for reason, names in _REASONS.items():
        for name in names.split():
            with pytest.raises(UnsupportedError) as refusal:
                getattr(model, name)()
            assert str(refusal.value) == f"{name} is not supported: {reason}"


def test_moves_agree_where_the_model_is(saved: Any) -> None:
    with saved("llama").open() as model:
        assert model.cpu() is model and model.float() is model
        for move in (model.cuda, model.half, model.bfloat16, model.double):
            with pytest.raises(UnsupportedError, match="Open it again"):
                move()
        assert model.eval() is model and model.requires_grad_(False) is model
        with pytest.raises(UnsupportedError, match="train"):
            model.requires_grad_()


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_parameters_are_those_of_the_checkpoint(name: str, saved: Any) -> None:
    made = saved(name)
    with made.open() as model:
        model.tie_weights()
        assert model.num_parameters() == sum(tensor.numel() for tensor in made.reference.parameters())
        assert model.num_parameters() == sum(tensor.numel() for tensor in model.parameters())
        assert model.num_parameters(only_trainable=True) == 0
        assert model.get_memory_footprint() == 4 * model.num_parameters()
        for tensor in model.parameters():
            assert tensor.dtype == torch.float32 and not tensor.requires_grad
            assert tensor.device == model.device and tensor.isnan().all()
            assert tensor.untyped_storage().nbytes() == 4


def test_inputs_go_where_the_parameters_are(model: Any, inputs: Any) -> None:
    given = {name: tensor.to(next(model.parameters()).device) for name, tensor in inputs([3]).items()}
    assert model.generate(**given, max_new_tokens=2, do_sample=False).shape == (1, 5)
    with pytest.raises(RequestError, match="meta device and have no values; move them to model.device"):
        model(given["input_ids"].to("meta"))


def test_attributes_that_harnesses_read(model: Any) -> None:
    assert model._supports_sdpa is False and model._no_split_modules is None
    assert not model.is_remote_code() and model.config.model_type == "llama"


def test_save_pretrained_writes_configs_and_names_the_weights(saved: Any, tmp_path: Any) -> None:
    made = saved("llama")
    with made.open() as model:
        with pytest.warns(UserWarning, match=f"not the weights.*{made.directory}"):
            model.save_pretrained(tmp_path)
        with pytest.raises(UnsupportedError, match="push_to_hub"):
            model.save_pretrained(tmp_path, push_to_hub=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "generation_config.json"]
    assert AutoConfig.from_pretrained(tmp_path).hidden_size == 32
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == 1


@pytest.mark.parametrize("options", [{}, dict(num_beams=2)], ids=["greedy", "beams"])
@pytest.mark.parametrize("device", [{}, dict(device="cpu"), dict(device=-1)], ids=str)
def test_a_pipeline(device: Any, options: Any, saved: Any, tokenizer: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # without device= a pipeline takes a GPU
    made, texts = saved("llama"), ["abc", "a longer one"]
    options = dict(max_new_tokens=4, do_sample=False, batch_size=2) | options
    with made.open() as model:
        ours = pipeline("text-generation", model=model, tokenizer=tokenizer, **device)(texts, **options)
    theirs = pipeline("text-generation", model=made.reference, tokenizer=tokenizer, **device)
    assert ours == theirs(texts, **options)
