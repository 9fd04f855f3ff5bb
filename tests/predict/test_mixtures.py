"""Predictions and searches for mixtures of experts: all experts move, and those that tokens choose are computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_families import TINY
from transformers import CONFIG_MAPPING

from flexgen import Auto, Policy
from flexgen.layout.placement import Placement, place_weights
from flexgen.layout.weights import weight_layouts
from flexgen.models import Layer, ModelSpec, build_layers, open_model
from flexgen.models.mixture import Mixture
from flexgen.policy import Split, Tier
from flexgen.predict.arithmetic import Arithmetic, layer_numbers
from flexgen.predict.hardware import Hardware
from flexgen.predict.job import Job
from flexgen.search.find import find_for_job
from flexgen.workload import Workload

EXPERTS, CHOSEN, HIDDEN, INNER = 7, 3, 32, 24


def _mixture() -> tuple[Layer, Placement]:
    """The first mixture of the tiny qwen3_moe, in host memory."""
    spec, _ = open_model(CONFIG_MAPPING["qwen3_moe"](**TINY["qwen3_moe"][0]), "dummy")
    layers = build_layers(spec)
    placement = place_weights(layers, Split(cpu=100), torch.float32)
    return next(layer for layer in layers if isinstance(layer, Mixture)), placement


def _seconds(hardware: Hardware, tokens: int) -> float:
    layer, placement = _mixture()
    return Arithmetic(placement, hardware).products(layer, tokens, 1, first=True)


@pytest.mark.parametrize("tokens", [1, 2, 5, 30, 64])
def test_products_of_few_rows_read_the_experts_that_are_expected_to_be_chosen(host: Any, tokens: int) -> None:
    """Up to 64 rows, a product takes as long as reading its matrix: 2 flops a value at 1e9 for one row."""
    bound_by_reads = host(products={"float32": [[1, 1e9], [64, 64e9]]})
    chosen = EXPERTS * (1 - (1 - CHOSEN / EXPERTS) ** tokens)
    values = EXPERTS * HIDDEN + chosen * 3 * HIDDEN * INNER
    assert _seconds(bound_by_reads, tokens) == pytest.approx(2 * values / 1e9, rel=1e-6)


@pytest.mark.parametrize("tokens", [1, 30, 5000])
def test_products_at_a_constant_rate_take_the_flops_of_the_chosen_experts(host: Any, tokens: int) -> None:
    flops = 2 * tokens * (EXPERTS * HIDDEN + CHOSEN * 3 * HIDDEN * INNER)
    assert _seconds(host(products={"float32": [[1, 1e9]]}), tokens) == pytest.approx(flops / 1e9)
    layer, _ = _mixture()
    assert layer.product_flops(tokens, 1, 1) == flops


def test_a_token_reads_and_writes_the_activations_of_its_own_experts() -> None:
    layer, _ = _mixture()
    assert layer_numbers(layer) == pytest.approx(HIDDEN + EXPERTS + CHOSEN * 3 * (HIDDEN + INNER))


def _published(name: str, layers: int) -> ModelSpec:
    """A known model with fewer layers."""
    spec, _ = open_model(name, "dummy")
    return spec.first_layers(layers)


def test_all_experts_move_for_each_visit() -> None:
    layers = build_layers(_published("qwen3-30b-a3b", 2))
    placement = place_weights(layers, Split(cpu=100), torch.bfloat16)
    layouts = weight_layouts(layers, placement, Hardware.preset("rtx-4090").topology)
    for layer, layout in zip(layers, layouts, strict=True):
        if isinstance(layer, Mixture):
            assert layout.nbytes == pytest.approx(layer.weight_bytes(torch.bfloat16), rel=1e-4)
            assert layout.nbytes > 128 * 3 * 768 * 2048 * 2


@pytest.mark.parametrize(
    ("name", "preset"),
    [("mixtral-8x7b", "t4"), ("qwen3-30b-a3b", "rtx-4090"), ("qwen3-30b-a3b", "laptop-16g")],
)
def test_a_search_finds_a_policy_for_published_mixtures(name: str, preset: str) -> None:
    job = Job.checked(_published(name, 2), Hardware.preset(preset), Workload(32, 64, 16))
    best = find_for_job(job, Auto(), top=1).best
    report = best.prediction.report
    assert report.total_s > 0 and report.bound_s <= report.total_s * 1.001


def test_a_host_that_computes_reads_less_for_one_token_than_for_many(host: Any) -> None:
    """Without a GPU nothing moves, so the time of a token is that of its own experts."""
    bound_by_reads = host(products={"float32": [[1, 1e9], [64, 64e9]]})
    assert _seconds(bound_by_reads, 1) < 0.5 * _seconds(bound_by_reads, 30)


def test_the_matrices_of_an_expert_go_to_the_same_tier() -> None:
    layer, _ = _mixture()
    placement = place_weights([layer], Split(gpu=40, cpu=60), torch.float32)
    tiers: dict[str, set[Tier]] = {}
    for weight in layer.weights:
        if weight.unit:
            tiers.setdefault(weight.unit, set()).add(placement.of(weight))
    assert len(tiers) == EXPERTS and all(len(of_expert) == 1 for of_expert in tiers.values())
    assert {Tier.GPU} in tiers.values() and {Tier.CPU} in tiers.values()
    assert abs(placement.percent[Tier.GPU] - 40) < 100 / EXPERTS


def test_encoded_experts_are_decoded_as_often_as_they_are_chosen(host: Any) -> None:
    """A codec without a product of its own: one decoding of each chosen expert."""
    wide = TINY["qwen3_moe"][0] | dict(hidden_size=64, moe_intermediate_size=64)
    layers = build_layers(open_model(CONFIG_MAPPING["qwen3_moe"](**wide), "dummy")[0])
    split = Policy(weights={"cpu": {"percent": 100, "codec": "int4"}}).weights
    placement = place_weights(layers, split, torch.float32)
    layer = next(layer for layer in layers if isinstance(layer, Mixture))
    flat = host(
        products={"float32": [[1, 1e30]]}, decoding={"int4": 1e8}, encoded_products={"float32 int4": []}
    )
    seconds = Arithmetic(placement, flat).products(layer, 2, 1, first=True)
    chosen = EXPERTS * (1 - (1 - CHOSEN / EXPERTS) ** 2)
    assert seconds == pytest.approx(chosen * 3 * 64 * 64 * 4 / 1e8, rel=1e-6)
