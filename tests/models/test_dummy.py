"""Dummy weights: fixed, well-behaved values."""

from __future__ import annotations

import pytest
import torch
from quantized_checkpoints import FORMATS
from transformers import LlamaConfig, Qwen3MoeConfig

from flexgen.models import WeightSpec, build_layers, open_model
from flexgen.models.dummy import DummyCheckpoint
from flexgen.models.sources import Source

BIG = WeightSpec("q.weight", (600, 1000), (Source("layers.0.q.weight"),))


def test_values_depend_on_the_key_alone():
    first, again = (DummyCheckpoint().read(BIG, torch.float32) for _ in range(2))
    other = DummyCheckpoint().read(
        WeightSpec("q.weight", (600, 1000), (Source("layers.1.q.weight"),)), torch.float32
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(DummyCheckpoint().read(BIG, torch.bfloat16), first.bfloat16())
    first.zero_()
    assert DummyCheckpoint().read(BIG, torch.float32).any()


def test_some_rows_have_the_values_they_have_in_the_whole():
    norm = WeightSpec("norm.weight", (7,), (Source("layers.0.norm.weight"),))
    for weight in (BIG, norm):
        whole = DummyCheckpoint().read(weight, torch.bfloat16)
        some = DummyCheckpoint().read(weight, torch.bfloat16, range(3, 6))
        assert torch.equal(some, whole[3:6])


def test_values_are_normal_and_rows_differ():
    values = DummyCheckpoint().read(BIG, torch.float32)
    assert abs(values.mean()) < 1e-3
    assert abs(values.std() - 0.02) < 1e-3
    assert len(values.unique(dim=0)) == len(values)


def test_norms_scale_by_one_and_shapes_are_those_of_the_specs():
    spec, checkpoint = open_model(
        LlamaConfig(hidden_size=64, num_hidden_layers=1, intermediate_size=96), "dummy"
    )
    for layer in (*build_layers(spec), *build_layers(spec, sep_layer=False)):
        for weight in layer.weights:
            values = checkpoint.read(weight, torch.float32)
            assert values.shape == weight.shape
            assert checkpoint.extent(weight) is None
            assert (values == 1).all() == weight.name.endswith("norm.weight")


@pytest.mark.parametrize("form", FORMATS)
def test_weights_of_a_published_format_have_random_bytes_of_that_format(form: str) -> None:
    config = Qwen3MoeConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        num_experts=3, num_experts_per_tok=2, moe_intermediate_size=64, quantization_config=FORMATS[form].config,
    )  # fmt: skip
    spec, checkpoint = open_model(config, "dummy")
    weights = {weight.name: weight for layer in build_layers(spec) for weight in layer.weights}
    encoded = {name for name, weight in weights.items() if weight.key in spec.encoded}
    matrices = {name for name, weight in weights.items() if len(weight.shape) == 2}
    assert matrices - encoded == {"embed.weight", "head.weight", "router.weight"}
    for name in encoded:
        weight = weights[name]
        own = spec.encoded[weight.key]
        parts = [checkpoint.read(part, torch.float32) for part in own.parts]
        for part, stored in zip(own.encoding.parts(weight.shape), parts, strict=True):
            assert stored.shape == part.shape and stored.dtype is part.read_as(part.dtypes[0])
        values = torch.empty(weight.shape)
        own.encoding.decode(parts, values)
        assert 0.01 < values.std() < 0.04
        assert len(values.unique(dim=0)) == len(values)
        assert checkpoint.read(weight, torch.float32).shape == weight.shape, "without the codec `stored`"


def test_known_models_have_the_format_of_their_release() -> None:
    spec, checkpoint = open_model("gpt-oss-20b", "dummy")
    layers = build_layers(spec)
    experts = [
        w
        for layer in layers
        for w in layer.weights
        if ".gate_up.weight" in w.name or ".down.weight" in w.name
    ]
    assert experts and {weight.key for weight in experts} == set(spec.encoded)
    codes, scales = spec.encoded[experts[0].key].parts
    assert checkpoint.read(codes, spec.dtype, range(3)).shape == (3, *codes.shape[1:])
    assert checkpoint.read(scales, spec.dtype).float().unique().tolist() == [2.0**-7]
