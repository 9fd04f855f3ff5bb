"""The feed-forward half of a transformer layer as a mixture of experts."""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from torch import Tensor

from flexgen.kernels.linear import linear
from flexgen.kernels.workspaces import Workspaces
from flexgen.models.layer import Weights, linear_weights
from flexgen.models.mlp import MLP, FeedForward, compute_mlp, mlp_flops, mlp_weights, mlp_workspace
from flexgen.models.mlp_spec import MixtureSpec, MLPSpec, RouterSpec
from flexgen.models.sources import OneRow, Source
from flexgen.models.spec import ModelSpec, WeightSpec

_EXPERT = re.compile(r"experts\.\d+\.")


class Mixture(FeedForward):
    """x + the sum of the chosen experts' outputs with their factors + shared(x).

    The weights of expert 3 are "experts.3.gate.weight", "experts.3.up.weight" and "experts.3.down.weight". An expert
    that no token chooses is not computed.
    """

    def __init__(self, spec: ModelSpec, index: int) -> None:
        mixture = _mixture(spec, index)
        weights = _router_weights(spec, mixture.router, index) + _expert_weights(spec, mixture, index)
        if mixture.shared is not None:
            weights += mlp_weights(spec, mixture.shared, index, "shared.")
        if mixture.shared_gate:
            (gate,) = linear_weights(spec, "shared_gate", 1, spec.hidden_size, bias=False, index=index)
            weights += (replace(gate, encodable=False),)
        super().__init__(spec, index, weights)

    @property
    def reads_back(self) -> bool:
        """The number of tokens of each expert."""
        return True

    @property
    def _mixture(self) -> MixtureSpec:
        return _mixture(self.spec, self.index)

    @property
    def _expert(self) -> MLPSpec:
        """An expert as an MLP."""
        return MLPSpec(self._mixture.size, self._mixture.activation, gated=True)

    def network(self, x: Tensor, weights: Weights) -> Tensor:
        mixture, flat = self._mixture, x.reshape(-1, x.shape[-1])
        out = self._chosen(flat, weights)
        if mixture.shared is not None:
            shared = compute_mlp(mixture.shared, flat, weights, "shared.")
            if mixture.shared_gate:
                shared.mul_(linear(flat, weights["shared_gate.weight"]).sigmoid_())
            out += shared
        if mixture.scale != 1:
            out *= mixture.scale
        return out.to(x.dtype).view(x.shape)

    def _chosen(self, x: Tensor, weights: Weights) -> Tensor:
        """The sum of the chosen experts' outputs for x (tokens, hidden), in float32."""
        router, expert = self._mixture.router, self._expert
        chosen, factors = route(router, x, weights)
        # The choices in the order of their experts. On a GPU, the host waits for the counts once for each layer.
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=router.experts).tolist()
        factors = factors.flatten()[order, None]
        tokens = order // router.top_k
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        end = 0
        for number, count in enumerate(counts):
            if count:
                begin, end = end, end + count
                rows = tokens[begin:end]
                outputs = compute_mlp(expert, x[rows], weights, f"experts.{number}.")
                out.index_add_(0, rows, outputs * factors[begin:end])
        return out

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
        choices = tokens * router.top_k * (3 * int64 + 3 * float32)
        routing = max(scores, workspaces.product(tokens, router.experts, hidden, dtype)) + choices
        # All tokens may choose the same expert. Its outputs are multiplied in float32.
        expert = states * (dtype.itemsize + float32)
        expert += mlp_workspace(self._expert, hidden, tokens, dtype, workspaces)
        shared = 0
        if mixture.shared is not None:
            shared = mlp_workspace(mixture.shared, hidden, tokens, dtype, workspaces)
        return max(routing, choices + states * float32 + max(expert, shared, states * dtype.itemsize))


def _mixture(spec: ModelSpec, index: int) -> MixtureSpec:
    mixture = spec.layers[index].mlp
    assert isinstance(mixture, MixtureSpec)
    return mixture


def _router_weights(spec: ModelSpec, router: RouterSpec, index: int) -> tuple[WeightSpec, ...]:
    """The weights "router.weight" (experts, hidden) and "router.bias" (experts), the correction."""
    dtype = torch.float32 if router.wide else None
    (weight,) = linear_weights(spec, "router", router.experts, spec.hidden_size, bias=False, index=index)
    weights: tuple[WeightSpec, ...] = (replace(weight, dtype=dtype, encodable=False),)
    if router.correction:
        sources = tuple(
            replace(name, name=name.name.format(i=index)).source(router.experts)
            if isinstance(name, OneRow)
            else Source(str(name).format(i=index))
            for name in spec.names["router_bias"]
        )
        weights += (WeightSpec("router.bias", (router.experts,), sources, dtype=torch.float32),)
    return weights


def _expert_weights(spec: ModelSpec, mixture: MixtureSpec, index: int) -> tuple[WeightSpec, ...]:
    """The weights of all experts, one expert after another."""
    experts = range(mixture.router.experts)
    into, out = (mixture.size, spec.hidden_size), (spec.hidden_size, mixture.size)
    matrices = {"gate": into, "up": into, "down": out}
    sources = {
        module: spec.expert_sources(f"experts.{module}", index, len(experts), matrix)
        for module, matrix in matrices.items()
    }
    return tuple(
        WeightSpec(f"experts.{number}.{module}.weight", matrix, sources[module][number])
        for number in experts
        for module, matrix in matrices.items()
    )


def route(router: RouterSpec, x: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    """The experts that each token of x (tokens, hidden) chooses and their float32 factors, both (tokens, top_k)."""
    logits = linear(x.float() if router.wide else x, weights["router.weight"]).float()
    scores = _scores(router, logits) if router.scored == "all" else logits
    offered = scores + weights["router.bias"] if router.correction else scores
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
