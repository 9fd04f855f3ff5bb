"""The policy search: shapes and codecs are enumerated, placements solved for, and the best of them simulated.

The method is that of FlexGen's paper (arXiv 2303.06865, section 4.3), with a simulation of the schedule in place of
its cost model for the last word.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from flexgen.errors import CapacityError
from flexgen.layout.fitting import parts_of
from flexgen.models import ModelSpec
from flexgen.policy import Auto, Policy, Split, Tier
from flexgen.predict.hardware import Hardware
from flexgen.predict.job import Job
from flexgen.predict.prediction import Prediction
from flexgen.schedule.orders import Slots
from flexgen.search.choices import Choices
from flexgen.search.limits import limits_in_words
from flexgen.search.linear import CLASSES, Solution, one_codec_each
from flexgen.search.moves import Short, filled, moves, squeezed
from flexgen.search.programs import Programs, Solved, by_seconds
from flexgen.search.simulations import Run, Simulations
from flexgen.units import format_bytes
from flexgen.workload import Workload

_ALL_OPEN = Auto()
"""No field of the policy is given, and no codec may be chosen."""
_CELLS = 25_000
"""Cells that are laid out to rank what the linear programs found, and as many to improve the winner."""
_LAST_CELLS = 40_000
"""Cells that are laid out of whole models at the end, for the winner and then for as many others as that allows."""
_REORDERED = 2
"""Shapes, the best of all, that are tried in every order."""
_ORDER_CELLS = 10_000
"""Cells that are laid out for that."""
_OWN_ORDER = 0.01
"""By what share of its time another order must be faster than the one that the policy asks for: a file of the policy
does not say it, so you have to give it with every run."""
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
    auto: Auto = _ALL_OPEN,
    *,
    dtype: str = "auto",
    order: str | None = None,
) -> Search:
    """The policy under which `predict` takes least for the workload, and some others.

    auto: the fields of the policy that are given, and whether codecs may be chosen that change what the model
        computes. Codecs in given fields always may.
    dtype, order: as of `predict`. Without an order all are tried that are not there for comparison only, and the
        policy's own is preferred to one that is less than 1% faster.

    Raises PolicyError for given fields that no policy has, RequestError, ScheduleError and HardwareError as
    `predict` does, and CapacityError, with what is short, where not even the smallest policy fits.
    """
    return find_for_job(Job.checked(spec, hardware, workload, dtype, order), auto)


def find_for_job(job: Job, auto: Auto, top: int = 5, slots: Slots | None = None) -> Search:
    """`find_policy` for a job that was checked, with at most `top` candidates.

    slots: the most that another order than a policy's own may want; None sets no limit.
    """
    began = time.perf_counter()
    # Where nothing fits, prompts are computed in parts: the first size of parts that fits is taken.
    given = [auto.fixed]
    if not Policy.from_dict(auto.fixed).prefill_chunk:
        given += [{**auto.fixed, "prefill_chunk": n} for n in parts_of(job.workload.prompt_len)]
    considered, refused = 0, None
    with _without_collections():
        for fixed in given:
            finder = _Finder(job, Choices(job, replace(auto, fixed=fixed)), slots)
            try:
                best, *others = finder.ranked(max(top, 1))
            except CapacityError as error:
                refused = refused or error
                continue
            finally:
                considered += finder.considered
            return Search(best, tuple(others), considered, time.perf_counter() - began)
    assert refused is not None
    raise refused


@contextmanager
def _without_collections() -> Iterator[None]:
    """Python does not look for cycles meanwhile. A search makes millions of small objects and no cycles, and Python
    would examine all objects of the process again and again, those of torch too: a sixth of the search."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Finder:
    def __init__(self, job: Job, choices: Choices, slots: Slots | None) -> None:
        self._job = job
        self._choices = choices
        self._programs = Programs(job, choices, slots)
        self._simulations = Simulations(job)
        self._tried: dict[Run, Solved] = {}
        self._took: dict[Run, float] = {}

    @property
    def considered(self) -> int:
        return self._programs.considered

    # A policy of it

    def _realised(self, solved: Solved) -> Policy | None:
        """The solution as a policy that fits. Where it took too much of a tier, by rounding or for a head that needs
        a slot, it is solved for again with as much less of it; where that has no solution, weights make room."""
        capacity, solution = self._programs.capacity.copy(), solved.solution
        first = self._choices.rounded(solved.form, solution.shares)
        for _ in range(8):
            policy = self._choices.rounded(solved.form, solution.shares)
            _, short = self._simulations.plan(Run(policy, solved.order))
            if (short <= 0).all():
                return policy
            capacity -= 1.05 * np.maximum(short, 0)
            again = one_codec_each(solved.figures, capacity, self._choices.given)
            if again is None:
                break
            solution = again
        settled = "weights" in self._choices.fixed
        return None if settled else squeezed(first, self._choices.tiers, self._short_in(solved.order))

    def _short_in(self, order: str | None) -> Short:
        return lambda policy: self._simulations.short(Run(policy, order))

    def _runs(self, solved: Solved) -> Iterator[tuple[Run, Solved]]:
        """The solution as policies that fit. Buffers are as large as the largest unit that moves, a head perhaps. The
        program does not know that, so what it left over is used, and overlap tried where it saw no room."""
        policy, choices = self._realised(solved), self._choices
        if policy is None:
            return
        settled, short = "weights" in choices.fixed, self._short_in(solved.order)
        yield Run(policy if settled else filled(policy, choices.tiers, short), solved.order), solved
        if settled or policy.overlap or "overlap" in choices.fixed or self._job.order:
            return
        if overlapped := squeezed(policy.replace(overlap=True), choices.tiers, short):
            form = solved.form.replace(overlap=True)
            own = solved._replace(form=form, figures=self._programs.figures(form, solved.order))
            yield Run(filled(overlapped, choices.tiers, short), solved.order), own

    # What the simulator says of it

    def ranked(self, top: int) -> list[Candidate]:
        """The candidates, best first."""
        simulations = self._simulations
        for solved in self._programs.all():
            beaten = self._took and solved.seconds > min(self._took.values())
            if len(self._tried) >= top and (beaten or simulations.laid_out > _CELLS):
                break
            self._try(solved)
        if not self._tried:
            solved = self._smallest()
            run = Run(self._choices.rounded(solved.form, solved.solution.shares), solved.order)
            if simulations.short(run):
                raise self._too_small(run)
            self._add(run, solved)
        self._try_orders()
        first, *others = sorted(self._tried, key=self._score)
        best = self._in_best_order(self._improved(first))
        kept, laid_out = [best], simulations.cells(best.policy)[0]
        for run in others:
            if len(kept) < top and (len(kept) < 2 or laid_out < _LAST_CELLS):
                kept.append(run)
                laid_out += simulations.cells(run.policy)[0]
        candidates = {run: self._candidate(run) for run in kept}
        took = {run: made.prediction.report.total_s for run, made in candidates.items()}
        first, *others = sorted(kept, key=lambda run: took[run] * self._handicap(run))
        # One that is faster by less than its order costs is no runner-up either.
        return [candidates[run] for run in (first, *others) if took[run] >= took[first]]

    def _try(self, solved: Solved) -> None:
        for run, own in self._runs(solved):
            self._add(run, own)

    def _add(self, run: Run, solved: Solved) -> None:
        if run not in self._tried:
            self._tried[run] = solved
            self._took[run] = self._simulations.seconds(run, solved.figures)

    def _try_orders(self) -> None:
        """The best shapes in the other orders: which one is fastest is not seen from what each lane has to do."""
        best = {self._tried[run].form: self._tried[run] for run in sorted(self._took, key=self._score)}
        runs = [
            run
            for solved in list(best.values())[:_REORDERED]
            for run in self._programs.other_orders(solved.form, solved.order)
        ]
        others = [solved for run in runs if (solved := self._programs.of(*run))]
        until = self._simulations.laid_out + _ORDER_CELLS
        for solved in by_seconds(others):
            if solved.seconds < min(self._took.values()) and self._simulations.laid_out < until:
                self._try(solved)

    def _in_best_order(self, best: Run) -> Run:
        """The policy, and where another order is better for it, one that is improved in that."""
        solved = self._tried[best]
        for run in self._programs.other_orders(*best):
            if self._simulations.short(run):
                continue
            form = solved.form.replace(overlap=run.policy.overlap)
            figures = self._programs.figures(form, run.order)
            self._add(run, solved._replace(form=form, order=run.order, figures=figures))
            if self._score(run) < self._score(best):
                best = self._improved(run)
        return best

    def _score(self, run: Run) -> float:
        return self._took[run] * self._handicap(run)

    def _handicap(self, run: Run) -> float:
        """By what the time counts more of a policy in an order that it does not ask for."""
        return 1.0 if run.order in (None, self._job.order) else 1 + _OWN_ORDER

    def _improved(self, run: Run) -> Run:
        """The policy with shares moved between tiers as long as the simulator says that it helps: fixed costs,
        whole rows and what is left of a tier are not linear."""
        simulations, solved = self._simulations, self._tried[run]
        until = simulations.laid_out + _CELLS
        least = self._took[run]
        for step in _STEPS:
            better = True
            while better and simulations.laid_out < until:
                better = False
                for policy in moves(run.policy, step, self._choices.tiers, self._choices.fixed):
                    if simulations.laid_out >= until:
                        break
                    moved = run._replace(policy=policy)
                    if simulations.short(moved):
                        continue
                    took = simulations.seconds(moved, solved.figures)
                    if took < least * (1 - 1e-4):
                        run, least, better = moved, took, True
                        break
        self._tried[run], self._took[run] = solved, least
        return run

    def _candidate(self, run: Run) -> Candidate:
        prediction, solved = self._simulations.prediction(run), self._tried[run]
        words = limits_in_words(run.policy, prediction, solved.figures, solved.solution, self._job)
        return Candidate(run.policy, prediction.report.order, prediction, words)

    def _smallest(self) -> Solved:
        """As few prompts in flight as there may be, without overlap unless that is given, with each class where
        it leaves the tiers least short."""
        size, numbers = next(iter(self._choices.shapes().items()))
        form = next(self._choices.forms()).replace(gpu_batch_size=size, num_gpu_batches=numbers[0])
        if "overlap" not in self._choices.fixed:
            form = form.replace(overlap=False)
        solved, short = self._programs.least_short(form), self._short_in(self._job.order)
        figures, solution = solved.figures, solved.solution
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
            if not short(self._choices.rounded(form, whole.shares)):
                solution = whole
        return solved._replace(solution=solution)

    def _too_small(self, run: Run) -> CapacityError:
        """What the smallest policy lacks."""
        plan, short = self._simulations.plan(run)
        weights_on_disk = plan.on(Tier.DISK, "weights")
        limits: dict[Tier, int | None] = {tier: self._job.hardware.capacity.get(tier) for tier in Tier}
        limits[Tier.DISK] = self._job.hardware.capacity[Tier.DISK] - weights_on_disk
        missing = ", ".join(
            f"{format_bytes(count)} of {tier}" for tier, count in zip(Tier, short, strict=True) if count > 0
        )
        return CapacityError(
            f"no policy for {self._job.spec.name} fits {self._job.hardware.name}, which is short by {missing}: "
            f"{plan.shortage(limits)}, with "
            f"{run.policy.num_gpu_batches} x {run.policy.gpu_batch_size} prompts in flight"
        )
