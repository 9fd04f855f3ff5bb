"""Dummy weights: fixed, well-behaved values."""

from __future__ import annotations

import torch
from transformers import LlamaConfig

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
