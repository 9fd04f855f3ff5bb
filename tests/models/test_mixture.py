"""Routers and mixtures of experts, against the definitions spelled out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_families import TINY
from transformers import CONFIG_MAPPING

from flexgen.kernels import grouped
from flexgen.kernels.grouped_matrices import grouped_matrices
from flexgen.models import build_layers, open_model
from flexgen.models.mixture import Mixture, route, router_logits
from flexgen.models.mlp_spec import RouterSpec

TOKENS, HIDDEN = 50, 6


def _weights(experts: int, correction: float = 0.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    bias = correction * torch.randn(experts, generator=generator)
    return {"router.weight": torch.randn(experts, HIDDEN, generator=generator), "correction": bias}


def _inputs() -> torch.Tensor:
    return torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(4))


def _route(router: RouterSpec, x: torch.Tensor, weights: dict[str, torch.Tensor]) -> Any:
    return route(router, router_logits(router, x, weights).float(), weights)


def test_softmax_of_all_then_the_largest() -> None:
    weights, x = _weights(7), _inputs()
    scores = (x @ weights["router.weight"].T).softmax(-1)
    largest = scores.topk(3)
    chosen, factors = _route(RouterSpec(7, 3), x, weights)
    assert torch.equal(chosen, largest.indices)
    torch.testing.assert_close(factors, largest.values)
    _, normalised = _route(RouterSpec(7, 3, normalised=True, scale=2.5), x, weights)
    torch.testing.assert_close(normalised, 2.5 * largest.values / largest.values.sum(-1, keepdim=True))


def test_the_largest_then_softmax_of_the_chosen() -> None:
    weights, x = _weights(7), _inputs()
    largest = (x @ weights["router.weight"].T).topk(3)
    chosen, factors = _route(RouterSpec(7, 3, scored="chosen"), x, weights)
    assert torch.equal(chosen, largest.indices)
    torch.testing.assert_close(factors, largest.values.softmax(-1))


def test_a_correction_changes_the_choice_and_not_the_factors() -> None:
    weights, x = _weights(7, correction=2.0), _inputs()
    scores = (x @ weights["router.weight"].T).sigmoid()
    chosen, factors = _route(RouterSpec(7, 2, score="sigmoid", correction=True), x, weights)
    assert torch.equal(chosen, (scores + weights["correction"]).topk(2).indices)
    assert not torch.equal(chosen, scores.topk(2).indices)
    torch.testing.assert_close(factors, scores.gather(-1, chosen))


def test_experts_are_chosen_from_the_groups_with_the_best_two() -> None:
    weights, x = _weights(12), _inputs()
    scores = (x @ weights["router.weight"].T).sigmoid()
    router = RouterSpec(12, 4, score="sigmoid", groups=4, top_groups=2)
    chosen, factors = _route(router, x, weights)
    for token in range(TOKENS):
        groups = scores[token].view(4, 3)
        best = sorted(range(4), key=lambda g: -groups[g].topk(2).values.sum())[:2]
        allowed = [3 * g + e for g in best for e in range(3)]
        expected = sorted(allowed, key=lambda e: -scores[token, e])[:4]
        assert chosen[token].tolist() == expected
    torch.testing.assert_close(factors, scores.gather(-1, chosen))


def test_a_sum_of_zero_gives_factors_of_zero() -> None:
    x = torch.full((1, HIDDEN), -1e30)
    weights = {"router.weight": torch.ones(5, HIDDEN)}
    router = RouterSpec(5, 2, score="sigmoid", normalised=True, least_sum=1e-20)
    assert _route(router, x, weights)[1].tolist() == [[0.0, 0.0]]


def _mixture(family: str, number: int = 0, **changes: Any) -> tuple[Mixture, dict[str, torch.Tensor]]:
    spec, checkpoint = open_model(CONFIG_MAPPING[family](**TINY[family][number] | changes), "dummy")
    layer = next(layer for layer in build_layers(spec) if isinstance(layer, Mixture))
    return layer, {weight.name: checkpoint.read(weight, torch.float32) for weight in layer.weights}


def test_an_expert_that_no_token_chooses_is_not_computed() -> None:
    layer, weights = _mixture("mixtral")
    x = torch.randn(1, 1, 32)
    chosen, _ = _route(layer.layer_spec.mlp.router, layer_input(layer, x, weights), weights)
    whole = layer.forward(x, weights, None)
    hit = {f"experts.{number}." for number in chosen.flatten().tolist()}
    only = {
        name: weight
        for name, weight in weights.items()
        if not name.startswith("experts.") or any(name.startswith(prefix) for prefix in hit)
    }
    assert len(only) == len(weights) - 3 * (7 - 3)
    assert torch.equal(layer.forward(x, only, None), whole)


def layer_input(layer: Mixture, x: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    normed = torch.nn.functional.rms_norm(x, (32,), weights["norm.weight"], layer.norm_in.eps)
    return normed.view(-1, 32)


def test_a_grouped_product_gives_the_same_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: all experts in one buffer, one after another."""
    layer, weights = _mixture("qwen3_moe")
    weights = {name: weight.bfloat16() for name, weight in weights.items()}
    buffer = torch.cat(
        [weights[weight.name].flatten() for weight in layer.weights if "experts." in weight.name]
    )
    begin = 0
    for weight in layer.weights:
        if "experts." in weight.name:
            weights[weight.name] = buffer[begin : begin + weight.numel].view(weight.shape)
            begin += weight.numel
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    one_by_one = layer.forward(x, weights, None)
    assert layer.reads_back(15, weights)
    calls = []
    monkeypatch.setattr("flexgen.kernels.grouped.available", lambda *of: True)
    grouped_linear = grouped.grouped_linear
    monkeypatch.setattr(grouped, "grouped_linear", lambda *of: calls.append(of) or grouped_linear(*of))
    for name, matrices, biases in layer.groups:
        assert not biases
        weights[name] = grouped_matrices([weights[matrix] for matrix in matrices], None, torch.bfloat16)
    assert not layer.reads_back(15, weights)
    together = layer.forward(x, weights, None)
    torch.testing.assert_close(together, one_by_one)
    assert len(calls) == 3, "gate, up and down"
    many = Mixture(replace(layer.spec, chunk_tokens=44), layer.index)  # 15 tokens with three choices each
    assert many.reads_back(15, weights) and not many.reads_back(14, weights)
    torch.testing.assert_close(many.forward(x, weights, None), one_by_one)
    assert len(calls) == 3, "for many choices, one expert after another"


def test_a_group_has_the_matrices_and_biases_of_all_experts() -> None:
    spec, _ = open_model(CONFIG_MAPPING["gpt_oss"](**TINY["gpt_oss"][1]), "dummy")
    for sep_layer, prefix in ((True, ""), (False, "mlp.")):
        layer = next(layer for layer in build_layers(spec, sep_layer) if layer.groups)
        names = [weight.name for weight in layer.weights]
        count = layer.layer_spec.mlp.router.experts
        assert [group.name for group in layer.groups] == [
            f"{prefix}experts.gate_up.weight", f"{prefix}experts.down.weight"
        ]  # fmt: skip
        for group in layer.groups:
            assert len(group.matrices) == len(group.biases) == count
            assert set(group.matrices) | set(group.biases) <= set(names)


def test_what_decides_is_not_rounded_by_a_codec() -> None:
    layer, _ = _mixture("qwen2_moe")
    plain = {weight.name for weight in layer.weights if len(weight.shape) == 2 and not weight.encodable}
    assert plain == {"router.weight", "shared_gate.weight"}


def test_weights_of_a_router_in_float32_count_as_such() -> None:
    layer, _ = _mixture("glm4_moe")
    wide = {weight.name for weight in layer.weights if weight.dtype is torch.float32}
    assert wide == {"router.weight", "correction"}
    values = sum(weight.numel for weight in layer.weights)
    assert layer.weight_bytes(torch.bfloat16) == 2 * values + 2 * (8 * 32 + 8)


@pytest.mark.parametrize("tokens", [1, 2, 40, 10_000])
def test_the_expected_experts_of_some_tokens(tokens: int) -> None:
    layer, _ = _mixture("mixtral")
    spec = layer.layer_spec.mlp
    assert spec.hit(1) == pytest.approx(3)
    assert spec.hit(tokens) == pytest.approx(7 * (1 - (4 / 7) ** tokens))
    by_name = {weight.name: layer.multiplies(weight, tokens) for weight in layer.weights}
    assert by_name["router.weight"] == (tokens, 1)
    rows, share = by_name["experts.6.down.weight"]
    assert share == pytest.approx(spec.hit(tokens) / 7)
    assert rows * share * 7 == pytest.approx(3 * tokens), "every token is multiplied by three experts"


def test_without_grouped_products_a_mixture_needs_the_host_and_an_mlp_does_not() -> None:
    spec, _ = open_model(CONFIG_MAPPING["qwen3_moe"](**TINY["qwen3_moe"][1]), "dummy")
    for sep_layer in (True, False):
        waits = {layer.name for layer in build_layers(spec, sep_layer) if layer.reads_back(4, {})}
        assert waits == {"layers.1.mlp" if sep_layer else "layers.1"}


def test_layers_with_other_routers_are_other_layers() -> None:
    layer, _ = _mixture("mixtral")
    own = layer.layer_spec
    other = replace(own, mlp=replace(own.mlp, router=replace(own.mlp.router, top_k=2)))
    assert own != other and hash(own) == hash(replace(own))
