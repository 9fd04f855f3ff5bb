"""Achieved percentages are within one tensor of the asked ones, and evenly over the layers."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexgen.layout.placement import place_weights
from flexgen.layout.topology import LINKED
from flexgen.layout.weight_slots import slot_sizes
from flexgen.models import build_layers, open_model
from flexgen.policy import Split, Tier

MODELS = ["opt-125m", "opt-350m", "opt-1.3b", "opt-6.7b", "opt-30b"]


@functools.cache
def layers_of(name, sep_layer=True):
    spec, _ = open_model(name, weights="dummy")
    return build_layers(spec, sep_layer)


@st.composite
def splits(draw):
    a, b = sorted((draw(st.integers(0, 1000)), draw(st.integers(0, 1000))))
    return Split(gpu=a / 10, cpu=(b - a) / 10, disk=(1000 - b) / 10)


def weights_of(layers):
    return {weight.key: weight for layer in layers for weight in layer.weights}.values()


def assert_within_one_tensor(layers, split, dtype):
    placement = place_weights(layers, split, dtype)
    sizes = [weight.nbytes(dtype) for weight in weights_of(layers)]
    total, largest = sum(sizes), max(sizes)
    assert sum(placement.nbytes.values()) == total
    for tier in Tier:
        asked = total * split.percent(tier) / 100
        assert abs(placement.nbytes[tier] - asked) <= largest, tier
        assert placement.percent[tier] == pytest.approx(100 * placement.nbytes[tier] / total)
    return placement


@given(split=splits(), name=st.sampled_from(MODELS), sep_layer=st.booleans())
def test_achieved_is_within_one_tensor_of_asked(split, name, sep_layer):
    assert_within_one_tensor(layers_of(name, sep_layer), split, torch.float16)


@given(
    split=splits(),
    sizes=st.lists(st.lists(st.integers(1, 500), min_size=1, max_size=6), min_size=1, max_size=12),
)
def test_achieved_is_within_one_tensor_for_tensors_of_any_size(split, sizes, make_layers):
    assert_within_one_tensor(make_layers(sizes), split, torch.float32)


@given(split=splits(), name=st.sampled_from(MODELS))
def test_bytes_by_tier_are_those_of_the_weights_there(split, name):
    layers = layers_of(name)
    placement = place_weights(layers, split, torch.float16)
    counted = dict.fromkeys(Tier, 0)
    for weight in weights_of(layers):
        counted[placement.of(weight)] += weight.nbytes(torch.float16)
    assert counted == placement.nbytes


@given(split=splits(), name=st.sampled_from(MODELS))
def test_a_tier_of_no_percent_gets_nothing(split, name):
    placement = place_weights(layers_of(name), split, torch.float16)
    used = set(placement.tiers.values())
    assert used <= {tier for tier in Tier if split.percent(tier) > 0}


@pytest.mark.parametrize("sep_layer", [True, False])
@pytest.mark.parametrize(("name", "tied"), [("opt-30b", True), ("llama-3.1-8b", False)])
def test_the_head_is_on_the_fastest_tier_with_room_for_it(name, tied, sep_layer):
    """Its slot would take as much memory of the device. The layers between share the rest evenly."""
    layers = layers_of(name, sep_layer)
    head = max(layers[-1].weights, key=lambda weight: weight.numel)
    assert (head.key in {weight.key for weight in layers[0].weights}) == tied
    total = sum(weight.nbytes(torch.float16) for weight in weights_of(layers))
    room = 100 * head.nbytes(torch.float16) / total
    for gpu, tier in ((room + 10, Tier.GPU), (room / 4, Tier.CPU)):
        split = Split(gpu=gpu, cpu=100 - gpu)
        placement = assert_within_one_tensor(layers, split, torch.float16)
        assert placement.of(head) is tier
        slots = slot_sizes(layers, placement, LINKED, 3).device
        assert (slots[-1] < head.nbytes(torch.float16) / 10) == (tier is Tier.GPU)
    split = Split(gpu=room + 10, cpu=90 - room)
    moved = place_weights(layers, split, torch.float16)
    here = [
        sum(weight.nbytes(torch.float16) for weight in layer.weights if moved.of(weight) is Tier.GPU)
        for layer in layers[1:-1]
    ]
    largest = max(weight.nbytes(torch.float16) for layer in layers[1:-1] for weight in layer.weights)
    first, second = sum(here[: len(here) // 2]), sum(here[len(here) // 2 :])
    assert abs(first - second) <= 2 * largest


@pytest.mark.parametrize("tier", list(Tier))
def test_all_on_one_tier(tier):
    placement = place_weights(layers_of("opt-125m"), Split(**{tier: 100}), torch.float16)
    assert set(placement.tiers.values()) == {tier}
    assert placement.percent == dict.fromkeys(Tier, 0.0) | {tier: 100.0}


@pytest.mark.parametrize(
    "split", [Split(gpu=50, cpu=50), Split(gpu=20, cpu=50, disk=30), Split(cpu=10, disk=90)]
)
def test_every_layer_of_a_deep_model_streams_about_the_same(split):
    """No window of consecutive layers is further from its share than two of their tensors."""
    layers = layers_of("opt-30b", sep_layer=False)[1:-1]
    placement = place_weights(layers_of("opt-30b", sep_layer=False), split, torch.float16)
    largest = max(weight.nbytes(torch.float16) for layer in layers for weight in layer.weights)
    for tier in Tier:
        on_tier = [
            sum(w.nbytes(torch.float16) for w in layer.weights if placement.of(w) is tier) for layer in layers
        ]
        share = layers[0].weight_bytes(torch.float16) * split.percent(tier) / 100
        for begin in range(0, len(layers), 8):
            window = on_tier[begin : begin + 8]
            assert abs(sum(window) - len(window) * share) <= 2 * largest


@pytest.mark.parametrize("split", [Split(gpu=30, cpu=70), Split(disk=100), Split(gpu=5, cpu=5, disk=90)])
def test_a_tied_head_counts_once_and_lives_with_the_embedding(split):
    layers = layers_of("opt-125m")
    embed = next(w for w in layers[0].weights if w.name == "embed.weight")
    head = next(w for w in layers[-1].weights if w.shape == embed.shape)
    assert head.key == embed.key
    placement = place_weights(layers, split, torch.float16)
    assert placement.of(head) is placement.of(embed)
    twice = sum(layer.weight_bytes(torch.float16) for layer in layers)
    assert sum(placement.nbytes.values()) == twice - embed.nbytes(torch.float16)


def test_placement_does_not_depend_on_the_dtype():
    split = Split(gpu=20, cpu=50, disk=30)
    layers = layers_of("opt-1.3b")
    assert (
        place_weights(layers, split, torch.float16).tiers == place_weights(layers, split, torch.float32).tiers
    )
