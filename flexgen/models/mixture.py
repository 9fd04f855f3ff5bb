"""The feed-forward half of a transformer layer as a mixture of experts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flexgen.kernels import grouped
from flexgen.kernels.linear import linear
from flexgen.kernels.routing import (
    Routed,
    RouterForm,
    by_expert,
    expert_sum,
    route_natively,
    routes_natively,
)
from flexgen.kernels.rows import gather_rows
from flexgen.kernels.workspaces import Workspaces
from flexgen.models.layer import MatrixGroup, Weights, linear_weights
from flexgen.models.mlp import MLP, FeedForward, compute_mlp, mlp_flops, mlp_weights, mlp_workspace
from flexgen.models.mlp_spec import MixtureSpec, MLPSpec, RouterSpec
from flexgen.models.norms import norm_weights, norm_workspace, normalise
from flexgen.models.ops import gated
from flexgen.models.sources import OneRow, Source
from flexgen.models.spec import ModelSpec, WeightSpec

_Product = Callable[[Tensor, Sequence[str]], list[Tensor]]
"""The products of rows with the matrices of their experts, for each of some modules ("gate", "up")."""

_EXPERT = re.compile(r"experts\.\d+\.")


class Mixture(FeedForward):
    """x + the sum of the chosen experts' outputs with their factors + shared(x).

    The weights of expert 3 are "experts.3.gate.weight", "experts.3.up.weight" and "experts.3.down.weight", or with
    both first matrices in one "experts.3.gate_up.weight". An expert that no token chooses is not computed.
    """

    def __init__(self, spec: ModelSpec, index: int) -> None:
        mixture = _mixture(spec, index)
        weights = _router_weights(spec, mixture.router, index) + _expert_weights(spec, mixture, index)
        if mixture.shared is not None:
            weights += mlp_weights(spec, mixture.shared, index, "shared.")
        if mixture.norms is not None:
            for place in ("experts_in", "experts_out", "shared_in", "shared_out"):
                weights += norm_weights(spec, getattr(mixture.norms, place), place, index, place)
            weights += _vector(spec, "router_in", spec.hidden_size, index, "router_in.weight")
        if mixture.expert_scale:
            weights += _vector(spec, "expert_scale", mixture.router.experts, index, "expert_scale")
        if mixture.shared_gate:
            (gate,) = linear_weights(spec, "shared_gate", 1, spec.hidden_size, bias=False, index=index)
            weights += (replace(gate, encodable=False),)
        super().__init__(spec, index, weights)

    @property
    def groups(self) -> Sequence[MatrixGroup]:
        """The matrices of all experts, by module."""

        def own(module: str, part: str) -> tuple[str, ...]:
            return tuple(f"experts.{n}.{module}.{part}" for n in range(self._mixture.router.experts))

        return [
            MatrixGroup(
                _group(module), own(module, "weight"), own(module, "bias") if self._mixture.bias else ()
            )
            for module in self._matrices
        ]

    def reads_back(self, tokens: int, weights: Weights) -> bool:
        """The number of tokens of each expert, if no product of all experts reads it on the device."""
        return not self._in_one_product(tokens * self._mixture.router.top_k, weights)

    def _in_one_product(self, choices: int, weights: Weights) -> bool:
        """Whether all experts are multiplied at once."""
        products = [weights.get(_group(module)) for module in self._matrices]
        return choices <= self.spec.chunk_tokens and all(
            p is not None and p.serves(choices) for p in products
        )

    @property
    def _mixture(self) -> MixtureSpec:
        return _mixture(self.spec, self.index)

    @property
    def _expert(self) -> MLPSpec:
        """An expert as an MLP."""
        return MLPSpec(self._mixture.size, self._mixture.activation, gated=True)

    def network(self, x: Tensor, weights: Weights) -> Tensor:
        mixture, flat = self._mixture, x.reshape(-1, x.shape[-1])
        norms = mixture.norms
        out = self._chosen(flat, weights)
        if norms is not None:
            out = normalise(norms.experts_out, out.to(x.dtype), weights, "experts_out").float()
        if mixture.shared is not None:
            given = flat if norms is None else normalise(norms.shared_in, flat, weights, "shared_in")
            shared = compute_mlp(mixture.shared, given, weights, "shared.")
            if norms is not None:
                shared = normalise(norms.shared_out, shared, weights, "shared_out")
            if mixture.shared_gate:
                shared.mul_(linear(flat, weights["shared_gate.weight"]).sigmoid_())
            out += shared
        if mixture.scale != 1:
            out *= mixture.scale
        return out.to(x.dtype).view(x.shape)

    def _chosen(self, x: Tensor, weights: Weights) -> Tensor:
        """The sum of the chosen experts' outputs for x (tokens, hidden), in float32 if it is used further."""
        mixture = self._mixture
        routed = self._routed(x, weights)
        if mixture.norms is not None:
            x = normalise(mixture.norms.experts_in, x, weights, "experts_in")
        tokens, factors, _, ends = routed
        if len(tokens) > self.spec.chunk_tokens:  # outputs of all choices would take much memory
            out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
            for number, (begin, end) in _spans(ends).items():
                rows, product = tokens[begin:end], self._each({number: (0, end - begin)}, weights)
                out.index_add_(0, rows, self._weighted(x[rows], factors[begin:end, None], product))
            return out
        together = self._in_one_product(len(tokens), weights)
        product = self._grouped(ends, weights) if together else self._each(_spans(ends), weights)
        chosen = gather_rows(x, tokens)
        if mixture.weighted == "inputs":
            chosen = chosen * factors[:, None].to(x.dtype)
            routed = routed._replace(factors=torch.ones_like(factors))
        alone = mixture.norms is None and mixture.shared is None and mixture.scale == 1
        return expert_sum(self._outputs(chosen, product), routed, x.dtype if alone else torch.float32)

    def _routed(self, x: Tensor, weights: Weights) -> Routed:
        """The experts that each token of x (tokens, hidden) chooses."""
        router, own = self._mixture.router, self._of_router(x, weights)
        logits = router_logits(router, own, weights)
        plain = router.groups == 1 and not self._mixture.expert_scale
        if plain and routes_natively(logits):
            return route_natively(logits, weights.get("correction"), router_form(router))
        chosen, factors = route(router, logits.float(), weights)
        if self._mixture.expert_scale:
            factors = factors * weights["expert_scale"][chosen]
        return by_expert(chosen, factors, router.experts)

    def _of_router(self, x: Tensor, weights: Weights) -> Tensor:
        """The input of the router, from that of the mixture."""
        norms = self._mixture.norms
        if norms is None:
            return x
        return normalise(norms.router_in, x, weights, "router_in").mul_(norms.router_scale)

    def _weighted(self, x: Tensor, factors: Tensor, product: _Product) -> Tensor:
        """The output of each row's expert for x (choices, hidden), with the factors (choices, 1) in float32."""
        if self._mixture.weighted == "inputs":
            return self._outputs(x * factors.to(x.dtype), product).float()
        return self._outputs(x, product) * factors

    def _outputs(self, x: Tensor, product: _Product) -> Tensor:
        """The output of each row's expert for x (choices, hidden)."""
        if self._mixture.first == "separate":
            inner = self._inner(*product(x, ("gate", "up")))
        else:
            (both,) = product(x, ("gate_up",))
            halves = (
                both.chunk(2, dim=-1) if self._mixture.first == "halves" else (both[:, 0::2], both[:, 1::2])
            )
            inner = self._inner(*halves)
            del both, halves
        return product(inner, ("down",))[0]

    def _inner(self, gate: Tensor, up: Tensor) -> Tensor:
        form = self._mixture.clamped
        if form is None:
            return gated(self._mixture.activation, gate, up)
        gate = gate.clamp(max=form.limit)
        gate.mul_((gate * form.alpha).sigmoid_())
        return up.clamp(-form.limit, form.limit).add_(1).mul_(gate)

    def _each(self, spans: Mapping[int, tuple[int, int]], weights: Weights) -> _Product:
        """Products of the rows `spans[number]` with expert `number`."""

        def product(x: Tensor, modules: Sequence[str]) -> list[Tensor]:
            columns = [[weights[f"experts.{n}.{module}.weight"] for n in spans] for module in modules]
            size = self._matrices[modules[0]][0]
            made = grouped.each_linear(x, list(spans.values()), columns, size)
            if self._mixture.bias:
                for module, y in zip(modules, made, strict=True):
                    for number, (begin, end) in spans.items():
                        y[begin:end] += weights[f"experts.{number}.{module}.bias"]
            return made

        return product

    def _grouped(self, ends: Tensor, weights: Weights) -> _Product:
        """Products of all experts at once. The rows of expert n end at ends[n]."""
        return lambda x, modules: [weights[_group(module)].multiply(x, ends) for module in modules]

    @property
    def _matrices(self) -> dict[str, tuple[int, int]]:
        return _matrices(self.spec, self._mixture)

    def network_flops(self, tokens: int) -> int:
        mixture, hidden = self._mixture, self.spec.hidden_size
        flops = 2 * tokens * hidden * (mixture.router.experts + mixture.shared_gate)
        flops += mixture.router.top_k * mlp_flops(self._expert, hidden, tokens)
        return flops + (mlp_flops(mixture.shared, hidden, tokens) if mixture.shared else 0)

    def multiplies(self, weight: WeightSpec, tokens: int) -> tuple[float, float]:
        if not _EXPERT.search(weight.name):
            return tokens, 1.0
        mixture = self._mixture
        hit = mixture.hit(tokens)
        return tokens * mixture.router.top_k / hit, hit / mixture.router.experts

    def network_workspace(self, tokens: int, dtype: torch.dtype, workspaces: Workspaces) -> int:
        mixture, hidden = self._mixture, self.spec.hidden_size
        router, float32, int64 = mixture.router, torch.float32.itemsize, torch.int64.itemsize
        states = tokens * hidden
        # Logits, scores, scores of the choice and a copy without some groups; values and indices of the choice.
        scores = tokens * 4 * router.experts * float32
        scores += states * float32 if router.wide else 0
        choices = tokens * router.top_k * (3 * int64 + 3 * float32) + router.experts * (int64 + float32)
        routing = max(scores, workspaces.product(tokens, router.experts, hidden, dtype)) + choices
        # Few choices at once, with their outputs in both orders; or one expert at once, which all tokens may choose.
        # Outputs are multiplied in float32.
        rows = max(tokens, min(tokens * router.top_k, self.spec.chunk_tokens))
        expert = rows * hidden * (dtype.itemsize + 2 * float32)
        expert += mlp_workspace(self._expert, hidden, rows, dtype, workspaces)
        # The product with one matrix before it is copied. The temporaries of a clamped product; or the product with
        # a fused matrix, which stays while it is multiplied again, and a contiguous copy of a half of it.
        inner = 5 if mixture.clamped else 1 if mixture.first == "separate" else 3
        expert += rows * max(hidden, inner * mixture.size) * dtype.itemsize
        if mixture.weighted == "inputs":
            expert += rows * hidden * dtype.itemsize
        shared = 0
        if mixture.shared is not None:
            shared = mlp_workspace(mixture.shared, hidden, tokens, dtype, workspaces)
        if mixture.norms is not None:  # the input of the router; those of the experts and of `shared`
            routing += norm_workspace(mixture.norms.router_in, hidden, tokens, dtype, workspaces)
            expert += states * dtype.itemsize
            shared += states * dtype.itemsize
            shared = max(
                shared, norm_workspace(mixture.norms.shared_out, hidden, 2 * tokens, dtype, workspaces)
            )
        return max(routing, choices + states * float32 + max(expert, shared, states * dtype.itemsize))


def _group(module: str) -> str:
    """The name of the `GroupedMatrices` of all experts."""
    return f"experts.{module}.weight"


def _mixture(spec: ModelSpec, index: int) -> MixtureSpec:
    mixture = spec.layers[index].mlp
    assert isinstance(mixture, MixtureSpec)
    return mixture


def _vector(spec: ModelSpec, module: str, size: int, index: int, name: str) -> tuple[WeightSpec, ...]:
    """A weight (size) whose name in checkpoints is that of the module."""
    return (WeightSpec(name, (size,), tuple(map(Source, spec.module_names(module, index)))),)


def _router_weights(spec: ModelSpec, router: RouterSpec, index: int) -> tuple[WeightSpec, ...]:
    """The weights "router.weight" (experts, hidden), "router.bias" (experts) and "correction" (experts)."""
    dtype = torch.float32 if router.wide else None
    parts = linear_weights(spec, "router", router.experts, spec.hidden_size, router.bias, index)
    weights = tuple(replace(weight, dtype=dtype, encodable=False) for weight in parts)
    if router.correction:
        sources = tuple(
            replace(name, name=name.name.format(i=index)).source(router.experts)
            if isinstance(name, OneRow)
            else Source(str(name).format(i=index))
            for name in spec.names["correction"]
        )
        weights += (WeightSpec("correction", (router.experts,), sources, dtype=torch.float32),)
    return weights


def _matrices(spec: ModelSpec, mixture: MixtureSpec) -> dict[str, tuple[int, int]]:
    """The shapes of an expert's matrices."""
    into, out = (mixture.size, spec.hidden_size), (spec.hidden_size, mixture.size)
    if mixture.first != "separate":
        return {"gate_up": (2 * mixture.size, spec.hidden_size), "down": out}
    return {"gate": into, "up": into, "down": out}


def _expert_weights(spec: ModelSpec, mixture: MixtureSpec, index: int) -> tuple[WeightSpec, ...]:
    """The weights of all experts, one expert after another."""
    count = mixture.router.experts
    by_module: list[Sequence[WeightSpec]] = []
    for module, matrix in _matrices(spec, mixture).items():
        name, transposed = f"experts.{module}", f"experts.{module}" in spec.transposed
        stored = matrix[::-1] if transposed else matrix
        by_module.append(
            [
                WeightSpec(f"experts.{n}.{module}.weight", matrix, sources, transposed, unit=f"experts.{n}")
                for n, sources in enumerate(spec.expert_sources(name, index, count, stored))
            ]
        )
        if mixture.bias:
            size = matrix[:1]
            by_module.append(
                [
                    WeightSpec(f"experts.{n}.{module}.bias", size, sources, unit=f"experts.{n}")
                    for n, sources in enumerate(spec.expert_sources(f"{name}_bias", index, count, size))
                ]
            )
    return tuple(weight for expert in zip(*by_module, strict=True) for weight in expert)


def _spans(ends: Tensor) -> dict[int, tuple[int, int]]:
    """The rows of each expert that has any, by its number. On a GPU, the host waits for `ends` here."""
    begin, spans = 0, {}
    for number, end in enumerate(ends.tolist()):
        if begin < end:
            spans[number] = begin, end
            begin = end
    return spans


def router_logits(router: RouterSpec, x: Tensor, weights: Weights) -> Tensor:
    """The logits (tokens, experts) for x (tokens, hidden)."""
    given = x.float() if router.wide else x
    return linear(given, weights["router.weight"], weights.get("router.bias"))


def router_form(router: RouterSpec) -> RouterForm:
    """The router as its kernel needs it."""
    return RouterForm(
        router.top_k,
        router.score == "sigmoid",
        router.scored == "all",
        router.normalised,
        router.least_sum,
        router.scale,
    )


def route(router: RouterSpec, logits: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    """The experts that each token chooses by its float32 logits (tokens, experts), and their float32 factors, both
    (tokens, top_k)."""
    scores = _scores(router, logits) if router.scored == "all" else logits
    offered = scores + weights["correction"] if router.correction else scores
    if router.groups > 1:
        offered = _best_groups(router, offered)
    chosen = offered.topk(router.top_k, dim=-1).indices
    factors = scores.gather(-1, chosen)
    if router.scored == "chosen":
        factors = _scores(router, factors)
    if router.normalised:
        factors = factors / factors.sum(-1, keepdim=True).clamp_min(router.least_sum)
    return chosen, factors * router.scale if router.scale != 1 else factors


def _scores(router: RouterSpec, logits: Tensor) -> Tensor:
    return logits.softmax(-1) if router.score == "softmax" else logits.sigmoid()


def _best_groups(router: RouterSpec, offered: Tensor) -> Tensor:
    """`offered` (tokens, experts), with -inf for the experts outside of a token's best groups."""
    groups = offered.view(len(offered), router.groups, -1)
    best = groups.topk(2, dim=-1).values.sum(-1).topk(router.top_groups, dim=-1).indices
    others = torch.ones(groups.shape[:2], dtype=torch.bool, device=offered.device).scatter_(1, best, False)
    return groups.masked_fill(others[..., None], -torch.inf).flatten(1)


def feed_forward(spec: ModelSpec, index: int) -> FeedForward:
    """The second half of layer `index`."""
    kind = Mixture if isinstance(spec.layers[index].mlp, MixtureSpec) else MLP
    return kind(spec, index)
