"""The policy search: shapes and codecs are enumerated, placements solved for, and the best of them simulated.

The method is that of FlexGen's paper (arXiv 2303.06865, section 4.3), with a simulation of the schedule in place of
its cost model for the last word.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from flexgen.errors import CapacityError
from flexgen.memory.placement import Placement, place_weights
from flexgen.memory.plan import MemoryPlan, plan_memory
from flexgen.models import Layer, ModelSpec, build_layers
from flexgen.planning.choices import Choices
from flexgen.planning.hardware import Hardware
from flexgen.planning.limits import limits_in_words
from flexgen.planning.linear import CLASSES, Corners, Figures, Solution, one_codec_each, shares_of
from flexgen.planning.moves import filled, moves, squeezed
from flexgen.planning.predict import Prediction, check_request, predict, sampled_tokens
from flexgen.policy import Policy, Split, Tier
from flexgen.units import format_bytes
from flexgen.workload import Workload

_BEST = 8
"""Shapes, the best of a form, whose batches are tried a little smaller and a little larger too."""
_FEW_LAYERS = 6
"""Transformer layers of the small model whose overlap stands for that of a deeper one."""
_EXACT_CELLS = 3_000
"""A block of more cells than these is laid out for a small model and for some of its tokens."""
_CELLS = 25_000
"""Cells that are laid out to rank what the linear programs found, and as many to improve the winner."""
_LAST_CELLS = 40_000
"""Cells that are laid out of whole models at the end, for the winner and then for as many others as that allows."""
_STEPS = 100.0, 20.0, 5.0, 1.0
"""Percent that are moved at once to improve the winner; the first is all that a tier has."""


@dataclass(frozen=True)
class Candidate:
    """A policy with the order it runs in and what it would take; `limits` says why it is not faster."""

    policy: Policy
    order: str
    prediction: Prediction
    limits: tuple[str, ...]

    @property
    def tokens_s(self) -> float:
        """Predicted new tokens per second."""
        return self.prediction.report.throughput_tokens_s

    def placement(self) -> str:
        """As "weights 30% gpu, 70% cpu in int4; cache ..."."""
        return "; ".join(f"{what} {_split(getattr(self.policy, what))}" for what in CLASSES)


@dataclass(frozen=True)
class Search:
    """What a search found. `considered`: block shapes with attention, codecs and order that a linear program was
    solved for; `seconds`: what all of it took."""

    best: Candidate
    runners_up: tuple[Candidate, ...]
    considered: int
    seconds: float

    def line(self) -> str:
        """What was chosen."""
        best, policy = self.best, self.best.policy
        return (
            f"{best.placement()}; {policy.num_gpu_batches} x {policy.gpu_batch_size} prompts; {best.order}; "
            f"predicted {best.tokens_s:.4g} tokens/s, bound by {best.prediction.report.bottleneck}"
        )

    def table(self) -> str:
        """The candidates, best first."""
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


def find_policy(
    spec: ModelSpec,
    hardware: Hardware,
    workload: Workload,
    *,
    fixed: Mapping[str, Any] = {},
    lossy: bool = False,
    dtype: str = "auto",
    order: str | None = None,
    top: int = 5,
) -> Search:
    """The policy under which `predict` takes least for the workload, and at most `top` - 1 others.

    fixed: fields of a policy that are kept as they are; the search fills in the rest.
    lossy: whether codecs may be chosen that change what the model computes. Those in `fixed` always may.
    dtype, order: as of `predict`; without an order each policy's own.

    Raises PolicyError for `fixed` that no policy has, RequestError, ScheduleError and HardwareError as `predict`
    does, and CapacityError, with what is short, where not even the smallest policy fits.
    """
    began = time.perf_counter()
    settled = Policy.from_dict(fixed)
    name = check_request(spec, hardware, workload, dtype, order)
    found = _Finder(spec, hardware, workload, settled, frozenset(fixed), lossy, name, order)
    best, *others = found.ranked(max(top, 1))
    return Search(best, tuple(others), found.considered, time.perf_counter() - began)


class _Bound(NamedTuple):
    """What the linear program says of blocks of a form: seconds of the whole workload."""

    seconds: float
    form: Policy
    figures: Figures
    solution: Solution


def _seconds(bound: _Bound) -> float:
    return bound.seconds


class _Finder:
    def __init__(
        self,
        spec: ModelSpec,
        hardware: Hardware,
        workload: Workload,
        settled: Policy,
        fixed: frozenset[str],
        lossy: bool,
        dtype: str,
        order: str | None,
    ) -> None:
        self._spec = spec
        self._hardware = hardware
        self._workload = workload
        self._dtype_name = dtype
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._order = order
        self._choices = Choices(spec, hardware, workload, settled, fixed, lossy, self._dtype)
        self._corners = Corners(spec, hardware, workload, self._dtype, order)
        self._capacity = np.array([float(hardware.capacity.get(tier, 0)) for tier in Tier])
        self._layers: dict[bool, tuple[Layer, ...]] = {}
        self._placements: dict[tuple[bool, Split], Placement] = {}
        self._predictions: dict[tuple[Policy, bool], Prediction] = {}
        self._laid_out = 0
        self.considered = 0

    # What the linear programs say of it

    def _bounds(self) -> list[_Bound]:
        """Best first. Every other size of a batch, then those beside the best of them."""
        shapes = self._choices.shapes()
        sizes = list(shapes)
        bounds: list[_Bound] = []
        for form in self._choices.forms():
            found = self._bounds_of(form, {size: shapes[size] for size in sizes[::2]})
            best = {bound.form.gpu_batch_size for bound in sorted(found, key=_seconds)[:_BEST]}
            near = {n + side for n, size in enumerate(sizes) if size in best for side in (-1, 1)}
            # Where no size of the first half fits, a smaller one was among them: the first.
            found += self._bounds_of(form, {sizes[n]: shapes[sizes[n]] for n in near if 0 <= n < len(sizes)})
            bounds += found
        return sorted(bounds, key=_seconds)

    def _bounds_of(self, form: Policy, shapes: Mapping[int, list[int]]) -> list[_Bound]:
        bounds = []
        for size, numbers in sorted(shapes.items()):
            fitted = False
            for batches in numbers:
                bound = self._bound(form.replace(gpu_batch_size=size, num_gpu_batches=batches))
                if bound is None:
                    break  # more of them need more
                fitted = True
                bounds.append(bound)
            if not fitted and numbers[0] == 1:
                break  # and so do larger ones
        return bounds

    def _bound(self, form: Policy) -> _Bound | None:
        overlaps = (form.overlap,) if "overlap" in self._choices.fixed or self._order else (True, False)
        for overlap in overlaps:
            asked = form.replace(overlap=overlap)
            figures = self._corners.figures(asked, self._choices.columns)
            self.considered += 1
            if solution := one_codec_each(figures, self._capacity, self._choices.given):
                seconds = solution.seconds * _blocks(self._workload, asked)
                return _Bound(seconds, asked, figures, solution)
        return None

    # A policy of it

    def _plan(self, policy: Policy) -> tuple[MemoryPlan, np.ndarray]:
        """The plan, and by how many bytes each tier is short."""
        sep = policy.sep_layer
        if sep not in self._layers:
            self._layers[sep] = build_layers(self._spec, sep)
        key = sep, policy.weights
        if key not in self._placements:
            self._placements[key] = place_weights(self._layers[sep], policy.weights, self._dtype)
        slots, shared = self._corners.order(policy).slots, self._hardware.shares_host_memory
        block = self._layers[sep], self._placements[key], policy, self._dtype, shared, self._workload
        plan = plan_memory(*block, slots=slots)
        return plan, np.array([float(plan.on(tier)) for tier in Tier]) - self._capacity

    def _realised(self, bound: _Bound) -> Policy | None:
        """The solution as a policy that fits. Where it took too much of a tier, by rounding or for a head that needs
        a slot, it is solved for again with as much less of it; where that has no solution, weights make room."""
        capacity, solution = self._capacity.copy(), bound.solution
        first = self._choices.rounded(bound.form, solution.shares)
        for _ in range(8):
            policy = self._choices.rounded(bound.form, solution.shares)
            _, short = self._plan(policy)
            if (short <= 0).all():
                return policy
            capacity -= 1.05 * np.maximum(short, 0)
            again = one_codec_each(bound.figures, capacity, self._choices.given)
            if again is None:
                break
            solution = again
        settled = "weights" in self._choices.fixed
        return None if settled else squeezed(first, self._choices.tiers, self._short)

    def _short(self, policy: Policy) -> list[Tier]:
        """The tiers that it needs more of than there is."""
        return [tier for tier, count in zip(Tier, self._plan(policy)[1], strict=True) if count > 0]

    def _policies(self, bound: _Bound) -> Iterator[tuple[Policy, _Bound]]:
        """The solution as policies that fit. Buffers are as large as the largest unit that moves, a head perhaps. The
        program does not know that, so what it left over is used, and overlap tried where it saw no room."""
        policy, choices = self._realised(bound), self._choices
        if policy is None:
            return
        settled = "weights" in choices.fixed
        yield policy if settled else filled(policy, choices.tiers, self._short), bound
        if settled or policy.overlap or "overlap" in choices.fixed or self._order:
            return
        if beside := squeezed(policy.replace(overlap=True), choices.tiers, self._short):
            form = bound.form.replace(overlap=True)
            own = bound._replace(form=form, figures=self._corners.figures(form, choices.columns))
            yield filled(beside, choices.tiers, self._short), own

    # What the simulator says of it

    def _cells(self, policy: Policy, small: bool) -> tuple[int, bool]:
        """How many cells a prediction lays out, and whether these are all."""
        layers = len(self._layers[policy.sep_layer])
        if small:
            layers = min(layers, _FEW_LAYERS * (2 if policy.sep_layer else 1) + 2)
        prompts = min(self._workload.num_prompts, policy.block_size)
        cells = layers * -(-prompts // policy.gpu_batch_size)
        if cells * self._workload.gen_len <= _EXACT_CELLS:
            return cells * self._workload.gen_len, True
        tokens, _ = sampled_tokens(self._workload.gen_len, 1, bool(policy.cache.percent(Tier.DISK)))
        return cells * len(tokens), False

    def _simulated(self, policy: Policy, small: bool = False) -> Prediction:
        """`small`: for a model of few layers."""
        if (policy, small) not in self._predictions:
            cells, exact = self._cells(policy, small)
            self._laid_out += cells
            depth = min(self._spec.num_layers, _FEW_LAYERS) if small else self._spec.num_layers
            self._predictions[policy, small] = predict(
                replace(self._spec, num_layers=depth), policy, self._hardware, self._workload,
                dtype=self._dtype_name, order=self._order, samples=None if exact else 1,
            )  # fmt: skip
        return self._predictions[policy, small]

    def _took(self, policy: Policy, bound: _Bound) -> float:
        """Seconds of the workload: simulated, or for a large model what its lanes take, and on top what a small one
        loses by overlap that is not perfect."""
        if (policy, False) in self._predictions or self._cells(policy, small=False)[1]:
            return self._simulated(policy).report.total_s
        small = self._simulated(policy, small=True).report
        alone = bound.figures.seconds(shares_of(policy))
        longest = sum(
            max(alone[n][lane] for lane in lanes) for n, lanes in enumerate(small.phases.values()) if lanes
        )
        assert small.bound_s is not None
        return longest * _blocks(self._workload, policy) * small.total_s / small.bound_s

    def ranked(self, top: int) -> list[Candidate]:
        """The candidates, best first."""
        tried: dict[Policy, _Bound] = {}
        took: dict[Policy, float] = {}
        for bound in self._bounds():
            if len(tried) >= top and (bound.seconds > min(took.values()) or self._laid_out > _CELLS):
                break
            for policy, own in self._policies(bound):
                if policy not in tried:
                    tried[policy] = own
                    took[policy] = self._took(policy, own)
        if not tried:
            bound = self._smallest()
            policy = self._choices.rounded(bound.form, bound.solution.shares)
            if self._short(policy):
                raise self._too_small(policy)
            tried[policy], took[policy] = bound, self._took(policy, bound)
        first, *others = sorted(tried, key=took.__getitem__)
        best = self._improved(first, tried[first])
        tried[best] = tried[first]
        kept, self._laid_out = [best], self._cells(best, small=False)[0]
        for policy in others:
            if len(kept) < top and (len(kept) < 2 or self._laid_out < _LAST_CELLS):
                kept.append(policy)
                self._laid_out += self._cells(policy, small=False)[0]
        kept.sort(key=lambda policy: self._simulated(policy).report.total_s)
        return [self._candidate(policy, tried[policy]) for policy in kept]

    def _improved(self, policy: Policy, bound: _Bound) -> Policy:
        """The policy with shares moved between tiers as long as the simulator says that it helps: fixed costs,
        whole rows and what is left of a tier are not linear."""
        until = self._laid_out + _CELLS
        least = self._took(policy, bound)
        for step in _STEPS:
            better = True
            while better and self._laid_out < until:
                better = False
                for moved in moves(policy, step, self._choices.tiers, self._choices.fixed):
                    if self._laid_out >= until:
                        break
                    if self._short(moved):
                        continue
                    took = self._took(moved, bound)
                    if took < least * (1 - 1e-4):
                        policy, least, better = moved, took, True
                        break
        return policy

    def _candidate(self, policy: Policy, bound: _Bound) -> Candidate:
        prediction = self._simulated(policy)
        words = limits_in_words(
            policy, prediction, bound.figures, bound.solution, self._hardware.capacity, self._workload
        )
        return Candidate(policy, prediction.report.order, prediction, words)

    def _smallest(self) -> _Bound:
        """As few prompts in flight as there may be, without overlap unless it is asked for, with each class where
        it leaves the tiers least short."""
        size, numbers = next(iter(self._choices.shapes().items()))
        form = next(self._choices.forms()).replace(gpu_batch_size=size, num_gpu_batches=numbers[0])
        if "overlap" not in self._choices.fixed:
            form = form.replace(overlap=False)
        figures = self._corners.figures(form, self._choices.columns)
        solution = one_codec_each(figures, self._capacity, self._choices.given, elastic=True)
        assert solution is not None
        # What is split has buffers for each of its parts; where nothing is split there is least of them.
        ways = [
            [c for c in figures.columns if c.what == what]
            for what in CLASSES
            if what not in self._choices.fixed
        ]
        for way in itertools.product(*ways):
            whole = Solution(
                {**self._choices.given, **dict.fromkeys(way, 1.0)}, solution.seconds, solution.saved
            )
            if not self._short(self._choices.rounded(form, whole.shares)):
                solution = whole
        return _Bound(solution.seconds * _blocks(self._workload, form), form, figures, solution)

    def _too_small(self, policy: Policy) -> CapacityError:
        """What the smallest policy lacks."""
        plan, short = self._plan(policy)
        weights_on_disk = plan.on(Tier.DISK, "weights")
        limits: dict[Tier, int | None] = {tier: self._hardware.capacity.get(tier) for tier in Tier}
        limits[Tier.DISK] = self._hardware.capacity[Tier.DISK] - weights_on_disk
        missing = ", ".join(
            f"{format_bytes(count)} of {tier}" for tier, count in zip(Tier, short, strict=True) if count > 0
        )
        return CapacityError(
            f"no policy for {self._spec.name} fits {self._hardware.name}, which is short by {missing}: "
            f"{plan.shortage(limits)}, with "
            f"{policy.num_gpu_batches} x {policy.gpu_batch_size} prompts in flight"
        )


def _blocks(workload: Workload, policy: Policy) -> float:
    return max(workload.num_prompts / policy.block_size, 1.0)
