"""The policy search: shapes and codecs are enumerated, placements solved for, and the best of them simulated.

The method is that of FlexGen's paper (arXiv 2303.06865, section 4.3), with a simulation of the schedule in place of
its cost model for the last word.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from flexgen.errors import CapacityError
from flexgen.memory.placement import Placement, place_weights
from flexgen.memory.plan import MemoryPlan, plan_memory
from flexgen.models import Layer, ModelSpec, build_layers
from flexgen.planning.hardware import Hardware
from flexgen.planning.limits import limits_in_words
from flexgen.planning.linear import CLASSES, Column, Corners, Figures, Shares, Solution, one_codec_each
from flexgen.planning.predict import Prediction, check_request, predict
from flexgen.policy import CODECS, Policy, Share, Split, Tier
from flexgen.quant import head_format
from flexgen.units import format_bytes
from flexgen.workload import Workload

_MOST_BATCHES = 64
"""More batches of a block share a load of weights so well that there is next to nothing left to share."""
_EXACT_CELLS = 4_000
"""A block of more cells than these is simulated from some of its tokens: within 5%."""
_CELLS = 40_000
"""Cells that are laid out to rank what the linear programs found, and half as many to improve the winner."""
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
        """ "weights 30% gpu, 70% cpu in int4; cache ..."."""
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
            f"{best.placement()}; {policy.gpu_batch_size} x {policy.num_gpu_batches} prompts; {best.order}; "
            f"predicted {best.tokens_s:.4g} tokens/s, bound by {best.prediction.report.bottleneck}"
        )

    def table(self) -> str:
        """The candidates, best first."""
        rows = [("tokens/s", "prompts", "order", "bound by", "placement")]
        for candidate in (self.best, *self.runners_up):
            policy, report = candidate.policy, candidate.prediction.report
            shape = f"{policy.gpu_batch_size} x {policy.num_gpu_batches}"
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
        self._settled = settled
        self._fixed = fixed
        self._lossy = lossy
        self._dtype_name = dtype
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._order = order
        self._shared = hardware.shares_host_memory
        self._tiers = (Tier.CPU, Tier.DISK) if self._shared else (Tier.CPU, Tier.GPU, Tier.DISK)
        self._corners = Corners(spec, hardware, workload, self._dtype, order)
        self._capacity = np.array([float(hardware.capacity.get(tier, 0)) for tier in Tier])
        self._layers: dict[bool, tuple[Layer, ...]] = {}
        self._placements: dict[tuple[bool, Split], Placement] = {}
        self._predictions: dict[Policy, Prediction] = {}
        self._laid_out = 0
        self.considered = 0

    # What there is to choose from

    def _forms(self) -> Iterator[Policy]:
        """Everything but the shape and the placement: free classes are on the host."""
        free = {what: {Tier.CPU: 100} for what in CLASSES if what not in self._fixed}
        form = self._settled.replace(**free)
        attending = ("gpu",) if self._shared or self._on_device else ("gpu", "cpu")
        for attend_on in attending if "attend_on" not in self._fixed else (form.attend_on,):
            # Whole layers give the host something to attend to beside every one of them.
            apart = (True, False) if attend_on == "cpu" and not self._shared else (True,)
            for sep_layer in apart if "sep_layer" not in self._fixed else (form.sep_layer,):
                yield form.replace(attend_on=attend_on, sep_layer=sep_layer)

    @property
    def _on_device(self) -> bool:
        """Whether all of the cache is to be where the device attends to it."""
        return "cache" in self._fixed and self._settled.cache.percent(Tier.GPU) == 100

    @cached_property
    def _columns(self) -> tuple[Column, ...]:
        columns = []
        for what in CLASSES:
            if what in self._fixed:
                split: Split = getattr(self._settled, what)
                columns += [Column(what, tier, split[tier].codec) for tier in Tier if split.percent(tier)]
                continue
            for tier in self._tiers:
                columns += [Column(what, tier, codec) for codec in CODECS if self._may(what, codec)]
        return tuple(columns)

    def _may(self, what: str, codec: str) -> bool:
        """Whether a codec may be chosen for a class, and the machine has figures for it."""
        if codec == "none":
            return True
        if not self._lossy or what == "activations":
            return False
        if what == "weights":
            return codec in self._hardware.decoding
        known = codec in self._hardware.device_attention
        known &= self._shared or codec in self._hardware.host_attention
        return known and self._settled.attn_sparsity == 1 and _keeps_heads(codec, self._spec, self._dtype)

    @cached_property
    def _given(self) -> Shares:
        """The shares that are settled."""
        given = {}
        for column in self._columns:
            if column.what in self._fixed:
                split: Split = getattr(self._settled, column.what)
                given[column] = split.percent(column.tier) / 100
        return given

    def _shapes(self) -> dict[int, list[int]]:
        """Numbers of batches by their size, ascending: a block more than the job has prompts for is none, and the
        blocks of a job are about equally full."""
        prompts, settled = self._workload.num_prompts, self._settled
        size_fixed, batches_fixed = ("gpu_batch_size" in self._fixed, "num_gpu_batches" in self._fixed)
        sizes = [settled.gpu_batch_size] if size_fixed else _ladder(prompts)
        numbers = [settled.num_gpu_batches] if batches_fixed else _ladder(min(prompts, _MOST_BATCHES))
        shapes: set[tuple[int, int]] = set()
        for size in sizes:
            for batches in numbers:
                blocks = -(-prompts // (size * batches))
                each = -(-prompts // blocks)
                even = size if size_fixed else -(-each // batches)
                shapes.add((even, batches if batches_fixed else -(-each // even)))
        by_size: dict[int, list[int]] = {}
        for size, batches in sorted(shapes):
            by_size.setdefault(size, []).append(batches)
        return by_size

    # What the linear programs say of it

    def _bounds(self) -> list[_Bound]:
        """Best first."""
        bounds = []
        for form in self._forms():
            for size, numbers in self._shapes().items():
                fitted = False
                for batches in numbers:
                    bound = self._bound(form.replace(gpu_batch_size=size, num_gpu_batches=batches))
                    if bound is None:
                        break  # more of them need more
                    fitted = True
                    bounds.append(bound)
                if not fitted and numbers[0] == 1:
                    break  # and so do larger ones
        return sorted(bounds, key=lambda bound: bound.seconds)

    def _bound(self, form: Policy) -> _Bound | None:
        overlaps = (form.overlap,) if "overlap" in self._fixed or self._order else (True, False)
        for overlap in overlaps:
            asked = form.replace(overlap=overlap)
            figures = self._corners.figures(asked, self._columns)
            self.considered += 1
            solution = one_codec_each(figures, self._capacity, self._given)
            if solution is not None:
                blocks = self._workload.num_prompts / asked.block_size
                return _Bound(solution.seconds * max(blocks, 1), asked, figures, solution)
        return None

    # A policy of it

    def _rounded(self, form: Policy, shares: Shares) -> Policy:
        """Whole percentages, of cache and activations those of whole rows of a batch."""
        splits = {}
        for what in CLASSES:
            if what in self._fixed:
                continue
            own = {column: share for column, share in shares.items() if column.what == what}
            percents = np.array([own[column] for column in own])
            if what != "weights":
                percents = _whole(percents, form.gpu_batch_size) / form.gpu_batch_size
            percents = _whole(percents, 100)
            splits[what] = {c.tier: Share(int(p), c.codec) for c, p in zip(own, percents, strict=True) if p}
        return form.replace(**splits)

    def _plan(self, policy: Policy) -> tuple[MemoryPlan, np.ndarray]:
        """The plan, and by how many bytes each tier is short."""
        sep = policy.sep_layer
        if sep not in self._layers:
            self._layers[sep] = build_layers(self._spec, sep)
        key = sep, policy.weights
        if key not in self._placements:
            self._placements[key] = place_weights(self._layers[sep], policy.weights, self._dtype)
        slots = self._corners.order(policy).slots
        block = self._layers[sep], self._placements[key], policy, self._dtype, self._shared, self._workload
        plan = plan_memory(*block, slots=slots)
        return plan, np.array([float(plan.on(tier)) for tier in Tier]) - self._capacity

    def _realised(self, bound: _Bound) -> Policy | None:
        """The solution as a policy that fits. Where rounding took too much of a tier, it is solved for again with
        as much less of it."""
        capacity, solution = self._capacity.copy(), bound.solution
        for _ in range(8):
            policy = self._rounded(bound.form, solution.shares)
            _, short = self._plan(policy)
            if (short <= 0).all():
                return policy
            capacity -= 1.05 * np.maximum(short, 0)
            again = one_codec_each(bound.figures, capacity, self._given)
            if again is None:
                return None
            solution = again
        return None

    # What the simulator says of it

    def _simulated(self, policy: Policy) -> Prediction:
        if policy not in self._predictions:
            layers = len(self._layers[policy.sep_layer])
            batches = min(policy.num_gpu_batches, -(-self._workload.num_prompts // policy.gpu_batch_size))
            cells = layers * batches * self._workload.gen_len
            exact = cells <= _EXACT_CELLS
            self._laid_out += cells if exact else layers * batches * min(self._workload.gen_len, 6)
            self._predictions[policy] = predict(
                self._spec, policy, self._hardware, self._workload,
                dtype=self._dtype_name, order=self._order, samples=None if exact else 1,
            )  # fmt: skip
        return self._predictions[policy]

    def ranked(self, top: int) -> list[Candidate]:
        """The candidates, best first."""
        bounds = self._bounds()
        tried: dict[Policy, _Bound] = {}
        least = np.inf
        for bound in bounds:
            if len(tried) >= top and (bound.seconds > least or self._laid_out > _CELLS):
                break
            policy = self._realised(bound)
            if policy is None or policy in tried:
                continue
            tried[policy] = bound
            least = min(least, self._simulated(policy).report.total_s)
        if not tried:
            raise self._too_small()
        order = sorted(tried, key=self._took)
        best = self._improved(order[0])
        tried[best] = tried[order[0]]
        order = sorted({best, *order[1:]}, key=self._took)[:top]
        return [self._candidate(policy, tried[policy]) for policy in order]

    def _took(self, policy: Policy) -> float:
        return self._simulated(policy).report.total_s

    def _improved(self, policy: Policy) -> Policy:
        """The policy with shares moved between tiers as long as the simulator says that it helps: fixed costs,
        whole rows and what is left of a tier are not linear."""
        until = self._laid_out + _CELLS // 2
        for step in _STEPS:
            better = True
            while better and self._laid_out < until:
                better = False
                for moved in self._moves(policy, step):
                    if self._laid_out >= until:
                        break
                    if (self._plan(moved)[1] > 0).any():
                        continue
                    if self._took(moved) < self._took(policy) * (1 - 1e-4):
                        policy, better = moved, True
                        break
        return policy

    def _moves(self, policy: Policy, step: float) -> Iterator[Policy]:
        for what in CLASSES:
            if what in self._fixed:
                continue
            split: Split = getattr(policy, what)
            least = 0.0 if what == "weights" else 100 / policy.gpu_batch_size
            for source in Tier:
                percent = min(max(step, least), split.percent(source))
                for target in self._tiers:
                    if target is source or not percent:
                        continue
                    codec = (split[target] if split.percent(target) else split[source]).codec
                    moved = {tier: split[tier] for tier in Tier if split.percent(tier)}
                    moved[source] = Share(split.percent(source) - percent, split[source].codec)
                    moved[target] = Share(min(split.percent(target) + percent, 100.0), codec)
                    yield policy.replace(**{what: {t: s for t, s in moved.items() if s.percent}})

    def _candidate(self, policy: Policy, bound: _Bound) -> Candidate:
        prediction = self._simulated(policy)
        words = limits_in_words(
            policy, prediction, bound.figures, bound.solution, self._hardware.capacity, self._workload
        )
        return Candidate(policy, prediction.report.order, prediction, words)

    def _too_small(self) -> CapacityError:
        """What the smallest policy lacks."""
        size, numbers = next(iter(self._shapes().items()))
        form = next(self._forms()).replace(gpu_batch_size=size, num_gpu_batches=numbers[0])
        if "overlap" not in self._fixed:
            form = form.replace(overlap=False)
        figures = self._corners.figures(form, self._columns)
        solution = one_codec_each(figures, self._capacity, self._given, elastic=True)
        assert solution is not None
        policy = self._rounded(form, solution.shares)
        plan, short = self._plan(policy)
        weights_on_disk = plan.on(Tier.DISK, "weights")
        limits: dict[Tier, int | None] = {tier: self._hardware.capacity.get(tier) for tier in Tier}
        limits[Tier.DISK] = self._hardware.capacity[Tier.DISK] - weights_on_disk
        missing = ", ".join(
            f"{format_bytes(count)} of {tier}" for tier, count in zip(Tier, short, strict=True) if count > 0
        )
        return CapacityError(
            f"no policy for {self._spec.name} fits {self._hardware.name}, which is short by {missing}: "
            f"{plan.shortage(limits)}, with {size} x {numbers[0]} prompts in flight"
        )


def _keeps_heads(codec: str, spec: ModelSpec, dtype: torch.dtype) -> bool:
    try:
        head_format(codec, spec.head_dim, dtype)
    except ValueError:  # a PolicyError: the head's size does not divide
        return False
    return True


def _ladder(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ... and `most`."""
    steps = {most}
    power = 1
    while power <= most:
        steps |= {power, *([power // 2 * 3] if power > 1 else [])}
        power *= 2
    return sorted(step for step in steps if step <= most)


def _whole(parts: np.ndarray, total: int) -> np.ndarray:
    """`parts` of 1 as whole parts of `total`, the largest remainders rounded up."""
    exact = parts / parts.sum() * total
    whole = np.floor(exact + 1e-6)
    for n in np.argsort(whole - exact)[: round(total - whole.sum())]:
        whole[n] += 1
    return whole
