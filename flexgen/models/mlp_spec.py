"""The description of the second half of a transformer layer: an MLP, or a mixture of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flexgen.models.norm_spec import NormSpec


@dataclass(frozen=True)
class MLPSpec:
    """A feed-forward network of inner width `size`. `gated`: the activation of one projection multiplies another.

    fused: one matrix has the rows of both projections, the gate first.
    """

    size: int
    activation: str
    gated: bool = False
    fused: bool = False
    bias: bool = False


@dataclass(frozen=True)
class RouterSpec:
    """How a mixture chooses `top_k` of its `experts` for a token, and the factors of their outputs.

    A router has one row of weights for each expert, and so gives a logit for each. The scores of the logits decide
    which experts are chosen, and the factors are the scores of the chosen experts.
    """

    experts: int
    top_k: int

    bias: bool = False
    """Whether the logits have a bias."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    scored: Literal["all", "chosen"] = "all"
    """"all": the scores of all logits, of which the largest are chosen. "chosen": the largest logits are chosen, and
    only these are scored."""
    correction: bool = False
    """Whether a bias for each expert is added to its score for the choice, but not for the factor."""
    groups: int = 1
    top_groups: int = 1
    """The experts form `groups` of equal size. They are chosen from the `top_groups` whose best two scores have the
    largest sums."""

    normalised: bool = False
    """Whether the factors of a token are divided by their sum."""
    least_sum: float = 0.0
    """The smallest divisor."""
    scale: float = 1.0
    """The factor of all factors."""
    wide: bool = False
    """Whether the weights and the logits are float32, whatever the model's dtype."""


@dataclass(frozen=True)
class ClampedGLU:
    """The product (up + 1) * gate * sigmoid(alpha * gate), with `gate` limited to at most `limit` and `up` to
    -limit..limit."""

    alpha: float
    limit: float


@dataclass(frozen=True)
class MixtureNorms:
    """The norms of a mixture whose router, experts and shared MLP do not have the same input: before the router,
    before and after the experts, before and after the shared MLP."""

    router_in: NormSpec
    experts_in: NormSpec
    experts_out: NormSpec
    shared_in: NormSpec
    shared_out: NormSpec
    router_scale: float = 1.0
    """The factor of the router's input, after its norm."""


@dataclass(frozen=True)
class MixtureSpec:
    """A mixture of experts: gated MLPs of inner width `size`, of which a router chooses some for each token.

    The output is the sum of the chosen experts' outputs with the router's factors, plus that of `shared`, an MLP that
    computes all tokens.
    """

    router: RouterSpec
    size: int
    activation: str
    clamped: ClampedGLU | None = None
    """The product that replaces activation(gate) * up."""
    first: Literal["separate", "halves", "interleaved"] = "separate"
    """Whether the projections to the inner width are two matrices of each expert, or one with the rows of both: all
    rows of the gate first, or a row of each in turn."""
    bias: bool = False
    weighted: Literal["outputs", "inputs"] = "outputs"
    """What the router's factors multiply: the experts' outputs or their inputs."""

    shared: MLPSpec | None = None
    shared_gate: bool = False
    """Whether the output of `shared` is multiplied by the sigmoid of the product with a vector."""
    scale: float = 1.0
    """The factor of the output."""
    expert_scale: bool = False
    """Whether each expert has a stored number, by which its factors are multiplied."""
    norms: MixtureNorms | None = None
    """None: router, experts and `shared` have the same input."""

    def hit(self, tokens: float) -> float:
        """The expected number of different experts for `tokens` tokens, if all experts are equally likely and tokens
        choose independently. Real choices are less even, so fewer experts are hit."""
        chosen = self.router.top_k / self.router.experts
        return self.router.experts * (1 - (1 - chosen) ** tokens)
