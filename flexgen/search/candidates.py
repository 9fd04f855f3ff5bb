"""The results of a search: the best policy and the next ones, with their predictions."""

from __future__ import annotations

from dataclasses import dataclass

from flexgen.policy import Policy, Split, Tier
from flexgen.predict.prediction import Prediction
from flexgen.search.linear import CLASSES


@dataclass(frozen=True)
class Candidate:
    """A policy that the search found.

    policy: the policy.
    order: the name of its order.
    prediction: its prediction for the whole workload.
    limits: sentences that explain why it is not faster.
    """

    policy: Policy
    order: str
    prediction: Prediction
    limits: tuple[str, ...]

    @property
    def tokens_s(self) -> float:
        """Predicted new tokens per second."""
        return self.prediction.report.throughput_tokens_s

    def placement(self) -> str:
        """The placement as text, such as "weights 30% gpu, 70% cpu in int4; cache ..."."""
        return "; ".join(f"{what} {_split(getattr(self.policy, what))}" for what in CLASSES)


@dataclass(frozen=True)
class Search:
    """The result of a search.

    best: the fastest candidate.
    runners_up: the next candidates, best first.
    considered: the number of linear programs that were solved, for block shapes, devices of attention and orders.
    seconds: the time of the search.
    """

    best: Candidate
    runners_up: tuple[Candidate, ...]
    considered: int
    seconds: float

    def joined(self, other: Search, top: int) -> Search:
        """The best `top` candidates of two searches of one job."""
        every = (self.best, *self.runners_up, other.best, *other.runners_up)
        found = {(one.policy, one.order): one for one in every}  # both may have found the same
        best, *others = sorted(found.values(), key=lambda one: one.prediction.report.total_s)[: max(top, 1)]
        return Search(best, tuple(others), self.considered + other.considered, self.seconds + other.seconds)

    def line(self) -> str:
        """The best candidate in one line."""
        best, policy = self.best, self.best.policy
        return (
            f"{best.placement()}; {policy.num_gpu_batches} x {policy.gpu_batch_size} prompts; {best.order}; "
            f"predicted {best.tokens_s:.4g} tokens/s, bound by {best.prediction.report.bottleneck}"
        )

    def table(self) -> str:
        """A table of the candidates, best first."""
        rows = [("tokens/s", "prompts", "order", "bound by", "placement")]
        for candidate in (self.best, *self.runners_up):
            policy, report = candidate.policy, candidate.prediction.report
            shape = f"{policy.num_gpu_batches} x {policy.gpu_batch_size}"
            bound = str(report.bottleneck)
            rows.append((f"{candidate.tokens_s:.4g}", shape, candidate.order, bound, candidate.placement()))
        widths = [max(len(row[n]) for row in rows) for n in range(4)]
        return "\n".join("  ".join([*map(str.ljust, row, widths), row[4]]) for row in rows)


def _split(split: Split) -> str:
    parts = []
    for tier in Tier:
        if percent := split.percent(tier):
            codec = "" if split[tier].codec == "none" else f" in {split[tier].codec}"
            parts.append(f"{percent:g}% {tier}{codec}")
    return ", ".join(parts)
