"""The policy search: it enumerates shapes and codecs, solves for placements, and simulates the best of them.

The method is that of FlexGen's paper (arXiv 2303.06865, section 4.3), but the final ranking simulates the schedule
instead of using the paper's cost model.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import numpy as np

from flexgen.errors import CapacityError
from flexgen.layout.fitting import parts_of
from flexgen.models import ModelSpec
from flexgen.policy import Auto, Policy, Tier
from flexgen.predict.hardware import Hardware
from flexgen.predict.job import Job
from flexgen.schedule.orders import Slots
from flexgen.search.candidates import Candidate, Search
from flexgen.search.choices import Choices, reserves
from flexgen.search.effort import THOROUGH, Effort, without_collections
from flexgen.search.limits import limits_in_words
from flexgen.search.linear import CLASSES, Solution, one_codec_each
from flexgen.search.moves import Short, filled, moves, squeezed, with_room
from flexgen.search.programs import Programs, Solved, by_seconds
from flexgen.search.simulations import Run, Simulations
from flexgen.units import format_bytes
from flexgen.workload import Workload

_ALL_OPEN = Auto()
"""No field of the policy is given, and the search may not choose codecs."""
_REORDERED = 2
"""The number of best shapes to try in every order."""
_OWN_ORDER = 0.01
"""The share of the time by which another order must be faster than the policy's own order. A policy file does not
store an order, so you have to pass it to every run."""
_REFINED = 3
"""The number of best runs to improve. If prompts enter at a rate, each is also tried with other numbers of places."""
_ROUNDS = 3
"""The maximum number of times that a variant replaces the winner."""
_STEPS = 100.0, 20.0, 5.0, 1.0
"""The percentages to move in one step to improve the winner. The first moves everything on a tier."""


def find_policy(
    spec: ModelSpec,
    hardware: Hardware,
    workload: Workload,
    auto: Auto = _ALL_OPEN,
    *,
    dtype: str = "auto",
    order: str | None = None,
) -> Search:
    """Search for the policy with the shortest predicted time for the workload, and for the next best ones.

    spec, hardware, workload: the model, the machine, and the prompts and lengths.
    auto: the given fields of the policy, and whether the search may choose codecs, which change the model's results.
        Given fields may always have codecs.
    dtype: as in `predict`.
    order: the name of the order. None tries all orders except those that exist for comparison only, and prefers the
        policy's own order to one that is less than 1% faster.

    Raises PolicyError for invalid given fields; RequestError, ScheduleError and HardwareError as `predict` does; and
    CapacityError, with the shortage of each tier, if not even the smallest policy fits.
    """
    return find_for_job(Job.checked(spec, hardware, workload, dtype, order), auto)


def find_for_job(
    job: Job, auto: Auto, top: int = 5, slots: Slots | None = None, effort: Effort = THOROUGH
) -> Search:
    """`find_policy` for a job that was checked, with at most `top` candidates.

    slots: the maximum slots of an order that is not the policy's own; None sets no limit.
    effort: how much to compute.
    """
    found = _find(job, auto, top, slots, effort)
    if auto.lossy and found.best.policy.prefill_rows:
        # The linear program does not count the decoding of weights in each pass in which prompts enter, so it ranks
        # codecs too high.
        with suppress(CapacityError):
            found = found.joined(_find(job, replace(auto, lossy=False), top, slots, effort), top)
    for reserved in reserves(job, auto):
        reserving = replace(auto, fixed={**auto.fixed, "reserve_new": reserved})
        with suppress(CapacityError):
            found = found.joined(_find(job, reserving, top, slots, effort), top)
    return found


def _find(job: Job, auto: Auto, top: int, slots: Slots | None, effort: Effort) -> Search:
    """`find_for_job` for the given `Policy.reserve_new`."""
    began = time.perf_counter()
    # If nothing fits, prompts are computed in chunks, of the first chunk size that fits.
    given = [auto.fixed]
    if not Policy.from_dict(auto.fixed).prefill_chunk:
        given += [{**auto.fixed, "prefill_chunk": n} for n in parts_of(job.workload.prompt_len)]
    considered, refused = 0, None
    with without_collections():
        for fixed in given:
            finder = _Finder(job, Choices(job, replace(auto, fixed=fixed), effort.every), slots, effort)
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


class _Finder:
    def __init__(self, job: Job, choices: Choices, slots: Slots | None, effort: Effort) -> None:
        self._job = job
        self._choices = choices
        self._effort = effort
        self._programs = Programs(job, choices, slots)
        self._simulations = Simulations(job)
        self._tried: dict[Run, Solved] = {}
        self._took: dict[Run, float] = {}

    @property
    def considered(self) -> int:
        return self._programs.considered

    # From solutions to policies

    def _realised(self, solved: Solved) -> Policy | None:
        """The solution as a policy that fits, or None.

        If the policy exceeds a tier, by rounding or by a head that needs a slot, the program is solved again with a
        capacity that is smaller by the excess. If that has no solution, weights are moved to slower tiers.
        """
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
        """The solution as policies that fit.

        Slots have the size of the largest layer, which may be a head. The program does not know that, so the free
        memory that it leaves is filled, and overlap is tried even if the program found no room for it.
        """
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

    # Ranking by simulation

    def ranked(self, top: int) -> list[Candidate]:
        """The candidates, best first."""
        simulations = self._simulations
        for solved in self._programs.all():
            beaten = self._took and solved.seconds > min(self._took.values())
            if len(self._tried) >= top and (beaten or simulations.laid_out > self._effort.cells):
                break
            self._try(solved)
        if not self._tried:
            solved = self._smallest()
            run = Run(self._choices.rounded(solved.form, solved.solution.shares), solved.order)
            if simulations.short(run):
                raise self._too_small(run)
            self._add(run, solved)
        if self._choices.joins_layers:
            self._try_units()
        self._try_orders()
        contenders = self._contenders()
        leading = contenders[:_REFINED]
        improved = [self._in_best_order(self._improved(run)) for run in leading]
        # They were improved by simulations of a few layers, which are not exact.
        best = improved[0] if len(leading) == 1 else min([*improved, *leading], key=self._whole)
        others = [
            *contenders,
            *(run for run in sorted(self._tried, key=self._score) if run not in contenders),
        ]
        kept, laid_out = [best], simulations.cells(best.policy)[0]
        for run in others:
            if run != best and len(kept) < top and (len(kept) < 2 or laid_out < self._effort.last_cells):
                kept.append(run)
                laid_out += simulations.cells(run.policy)[0]
        best = min(kept, key=self._whole)
        starts = [best]
        if self._job.workload.copied > 1:  # a shape that is faster with guesses may be slower without them
            shapes = [run for run in sorted(self._tried, key=self._score) if run.policy != best.policy]
            starts += shapes[:_REFINED]
        fastest = min(map(self._fastest_alike, starts), key=self._whole)
        kept = [fastest, *(run for run in kept if run not in (best, fastest))]
        candidates = {run: self._candidate(run) for run in kept}
        took = {run: made.prediction.report.total_s for run, made in candidates.items()}
        first, *others = sorted(kept, key=lambda run: took[run] * self._handicap(run))
        # A candidate that is faster only without the handicap of its order is not a runner-up.
        return [candidates[run] for run in (first, *others) if took[run] >= took[first]]

    def _contenders(self) -> list[Run]:
        """The best runs, ranked by their predicted times for the whole model: as many as the effort allows. If it
        allows only one, this is the best run of the ranking so far.

        Passes in which prompts enter lose time where they begin and end. This time does not depend on the number of
        layers, so it is a larger share in a model of few layers.
        """
        some, laid_out = list[Run](), 0
        for run in sorted(self._tried, key=self._score):
            laid_out += self._simulations.cells(run.policy)[0]
            if some and laid_out > self._effort.last_cells:
                break
            some.append(run)
        if len(some) == 1:
            return some
        before = set(self._tried)
        for solved in [self._tried[run] for run in sorted(some, key=self._whole)[:_REFINED]]:
            for form in self._choices.places(solved.form):
                if other := self._programs.of(form, solved.order):
                    self._try(other)
        return sorted([*some, *(run for run in self._tried if run not in before)], key=self._whole)

    def _fastest_alike(self, best: Run) -> Run:
        """The fastest of `best` and its variants, then of this one and its variants, as long as it changes."""
        for _ in range(_ROUNDS):
            alike = self._choices.alike(best.policy, self._short_in(best.order))
            fastest = self._simulations.fastest(best, [best._replace(policy=policy) for policy in alike])
            if fastest == best:
                break
            self._tried[fastest], best = self._tried[best], fastest
        return best

    def _try(self, solved: Solved) -> None:
        for run, own in self._runs(solved):
            self._add(run, own)

    def _add(self, run: Run, solved: Solved) -> None:
        if run not in self._tried:
            self._tried[run] = solved
            self._took[run] = self._simulations.seconds(run, solved.figures)

    def _best_shapes(self) -> list[Solved]:
        best = {self._tried[run].form: self._tried[run] for run in sorted(self._took, key=self._score)}
        return list(best.values())[:_REORDERED]

    def _try_units(self) -> None:
        """Try the best shapes with whole layers, or with attention and MLPs apart if their layers are whole. The work
        of each lane is the same, so it does not show which of them overlaps better."""
        for solved in self._best_shapes():
            form = solved.form.replace(sep_layer=not solved.form.sep_layer)
            if other := self._programs.of(form, solved.order):
                self._try(other)

    def _try_orders(self) -> None:
        """Try the best shapes in the other orders. The work of each lane does not show which order is fastest."""
        runs = [
            run
            for solved in self._best_shapes()
            for run in self._programs.other_orders(solved.form, solved.order)
        ]
        others = [solved for run in runs if (solved := self._programs.of(*run))]
        until = self._simulations.laid_out + self._effort.order_cells
        for solved in by_seconds(others):
            if solved.seconds < min(self._took.values()) and self._simulations.laid_out < until:
                self._try(solved)

    def _in_best_order(self, best: Run) -> Run:
        """The policy, or an improved one in another order if that is better."""
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

    def _whole(self, run: Run) -> float:
        """As `_score`, for the whole model."""
        return self._simulations.prediction(run).report.total_s * self._handicap(run)

    def _handicap(self, run: Run) -> float:
        """The factor of a run's time in the ranking: above 1 if the order is not the policy's own."""
        return 1.0 if run.order in (None, self._job.order) else 1 + _OWN_ORDER

    def _improved(self, run: Run) -> Run:
        """The policy with shares moved between tiers while the simulated time improves.

        Fixed costs, whole rows and the free memory of tiers are not linear, so the program's solution is not optimal.
        """
        simulations, solved, short = self._simulations, self._tried[run], self._short_in(run.order)
        movable = () if "weights" in self._choices.fixed else self._choices.tiers
        until, least = simulations.laid_out + self._effort.cells, self._took[run]
        for step in _STEPS:
            better = True
            while better and simulations.laid_out < until:
                better = False
                for policy in moves(run.policy, step, self._choices.tiers, self._choices.fixed):
                    if simulations.laid_out >= until:
                        break
                    if (fitting := with_room(policy, movable, short)) is None:
                        continue
                    moved = run._replace(policy=fitting)
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
        """The smallest block, without overlap unless it is given, with the placement that exceeds the tiers least."""
        form = next(self._choices.forms())
        size, numbers = next(iter(self._choices.shapes(form).items()))
        form = form.replace(gpu_batch_size=size, num_gpu_batches=numbers[0])
        if "overlap" not in self._choices.fixed:
            form = form.replace(overlap=False)
        solved, short = self._programs.least_short(form), self._short_in(self._job.order)
        figures, solution = solved.figures, solved.solution
        # Split data needs buffers for each of its parts, so placements without a split need the fewest.
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
        """The error with the shortage of the smallest policy."""
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
            f"{run.policy.num_gpu_batches} x {run.policy.gpu_batch_size} prompts in flight. Use a smaller model, "
            "shorter prompts, codecs (lossy), or a machine with more memory"
        )
