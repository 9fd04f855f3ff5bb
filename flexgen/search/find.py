"""The policy search: it enumerates shapes and codecs, solves for placements, and simulates the best of them.

The method is that of FlexGen's paper (arXiv 2303.06865, section 4.3), but the final ranking simulates the schedule
instead of using the paper's cost model.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

from flexgen.errors import CapacityError
from flexgen.layout.fitting import parts_of
from flexgen.models import ModelSpec
from flexgen.policy import Auto, Policy
from flexgen.predict.hardware import Hardware
from flexgen.predict.job import Job
from flexgen.schedule.orders import Slots
from flexgen.search.candidates import Candidate, Search
from flexgen.search.choices import Choices, reserves
from flexgen.search.effort import THOROUGH, Effort, without_collections
from flexgen.search.fitting import Fitting
from flexgen.search.limits import limits_in_words
from flexgen.search.linear import Figures
from flexgen.search.moves import moves, with_room
from flexgen.search.programs import Programs, Solved, by_seconds
from flexgen.search.ranking import Ranking
from flexgen.search.simulations import Run, Simulations
from flexgen.workload import Workload

_ALL_OPEN = Auto()
"""No field of the policy is given, and the search may not choose codecs."""
_REORDERED = 2
"""The number of best shapes to try in every order."""
_REFINED = 3
"""The number of best runs to improve. If prompts enter at a rate, each is also tried with other numbers of places."""
_ROUNDS = 3
"""The maximum number of times that a variant replaces the winner."""
_STEPS = 100.0, 20.0, 5.0, 1.0
"""The percentages to move in one step to improve the winner. The first moves everything on a tier."""
_FASTER = 1e-4
"""The share of the time that a move must save at least."""


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
    """`find_for_job` for the given codecs and the given `Policy.reserve_new`."""
    began = time.perf_counter()
    considered, refused = 0, None
    with without_collections():
        for given in _whole_or_in_chunks(auto, job.workload.prompt_len):
            finder = _Finder(job, Choices(job, given, effort.every), slots, effort)
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


def _whole_or_in_chunks(auto: Auto, prompt_len: int) -> Iterator[Auto]:
    """The given fields, and if nothing fits with them, also a size of chunks of prompts, largest first."""
    yield auto
    if not Policy.from_dict(auto.fixed).prefill_chunk:
        for chunk in parts_of(prompt_len):
            yield replace(auto, fixed={**auto.fixed, "prefill_chunk": chunk})


class _Finder:
    """A search for given choices, in stages. Each stage adds runs to the ranking or improves its best ones."""

    def __init__(self, job: Job, choices: Choices, slots: Slots | None, effort: Effort) -> None:
        self._job = job
        self._choices = choices
        self._effort = effort
        self._programs = Programs(job, choices, slots)
        self._simulations = Simulations(job)
        self._fitting = Fitting(job, choices, self._programs, self._simulations)
        self._ranking = Ranking(job, self._simulations)

    @property
    def considered(self) -> int:
        return self._programs.considered

    def ranked(self, top: int) -> list[Candidate]:
        """At most `top` candidates, best first. Raises CapacityError if not even the smallest policy fits."""
        self._try_solutions(top)
        self._try_units()
        self._try_orders()
        contenders = self._contenders()
        kept = self._kept(self._best_improved(contenders[:_REFINED]), contenders, top)
        first, *others = sorted(self._with_fastest_variant(kept), key=self._ranking.whole_score)
        # A candidate that is faster only without the handicap of its order is not a runner-up.
        least = self._ranking.predicted(first)
        return [self._candidate(run) for run in (first, *others) if self._ranking.predicted(run) >= least]

    # The runs to rank

    def _try(self, solved: Solved) -> list[Run]:
        """Rank the policies of a solution. Returns those that are new."""
        return [run for run, own in self._fitting.runs(solved) if self._ranking.add(run, own)]

    def _try_solutions(self, top: int) -> None:
        """Try the solutions of all programs, best first, until those that follow cannot be faster. If none fits, try
        the smallest policy."""
        for solved in self._programs.all():
            if len(self._ranking) >= top:
                slower = solved.seconds > self._ranking.least_seconds
                if slower or self._simulations.laid_out > self._effort.cells:
                    break
            self._try(solved)
        if not self._ranking:
            self._ranking.add(*self._fitting.smallest())

    def _try_units(self) -> None:
        """Try the best shapes with whole layers, or with attention and MLPs apart if their layers are whole. The work
        of each lane is the same, so it does not show which of them overlaps better."""
        if not self._choices.joins_layers:
            return
        for solved in self._ranking.shapes()[:_REORDERED]:
            form = solved.form.replace(sep_layer=not solved.form.sep_layer)
            if other := self._programs.of(form, solved.order):
                self._try(other)

    def _try_orders(self) -> None:
        """Try the best shapes in the other orders. The work of each lane does not show which order is fastest."""
        runs = [
            run
            for solved in self._ranking.shapes()[:_REORDERED]
            for run in self._programs.other_orders(solved.form, solved.order)
        ]
        others = [solved for run in runs if (solved := self._programs.of(*run))]
        until = self._simulations.laid_out + self._effort.order_cells
        for solved in by_seconds(others):
            if solved.seconds < self._ranking.least_seconds and self._simulations.laid_out < until:
                self._try(solved)

    def _contenders(self) -> list[Run]:
        """The best runs, ranked by their predicted times for the whole model, and variants of them with other numbers
        of places. If the effort allows only one, it is the best run of the ranking so far.

        Passes in which prompts enter lose time where they begin and end. This time does not depend on the number of
        layers, so it is a larger share in a model of few layers.
        """
        some, laid_out = list[Run](), 0
        for run in self._ranking:
            laid_out += self._simulations.extent(run.policy).cells
            if some and laid_out > self._effort.last_cells:
                break
            some.append(run)
        if len(some) == 1:
            return some
        best = sorted(some, key=self._ranking.whole_score)[:_REFINED]
        for solved in [self._ranking.program(run) for run in best]:
            for form in self._choices.places(solved.form):
                if other := self._programs.of(form, solved.order):
                    some += self._try(other)
        return sorted(some, key=self._ranking.whole_score)

    def _kept(self, best: Run, contenders: list[Run], top: int) -> list[Run]:
        """`best`, and the runs next to it that become candidates: at most `top`, and as many as the effort allows."""
        others = [*contenders, *(run for run in self._ranking if run not in contenders)]
        kept, laid_out = [best], self._simulations.extent(best.policy).cells
        for run in others:
            if run != best and len(kept) < top and (len(kept) < 2 or laid_out < self._effort.last_cells):
                kept.append(run)
                laid_out += self._simulations.extent(run.policy).cells
        return kept

    # Improvements of the best runs

    def _best_improved(self, leading: list[Run]) -> Run:
        """The best of these runs, after each of them was improved."""
        improved = [self._in_best_order(self._improved(run)) for run in leading]
        if len(improved) == 1:
            return improved[0]
        # They were improved by simulations of a few layers, which are not exact.
        return min([*improved, *leading], key=self._ranking.whole_score)

    def _improved(self, run: Run) -> Run:
        """The policy with shares moved between tiers while the simulated time improves.

        Fixed costs, whole rows and the free memory of tiers are not linear, so the program's solution is not optimal.
        """
        figures, until = self._ranking.program(run).figures, self._simulations.laid_out + self._effort.cells
        best, seconds = run, self._ranking.seconds(run)
        for step in _STEPS:
            while faster := self._faster(best, seconds, figures, step, until):
                best, seconds = faster
        self._ranking.add_improved(best, run, seconds)
        return best

    def _faster(
        self, run: Run, seconds: float, figures: Figures, step: float, until: int
    ) -> tuple[Run, float] | None:
        """The first run that is faster after one move of `step` percent, and its seconds; None if there is none, or
        if `until` cells have been simulated before it is found.

        seconds: those of `run`. figures: those of its form and order.
        """
        choices, short = self._choices, self._fitting.short_in(run.order)
        movable = () if "weights" in choices.fixed else choices.tiers
        for policy in moves(run.policy, step, choices.tiers, choices.fixed):
            if self._simulations.laid_out >= until:
                return None
            if (fitting := with_room(policy, movable, short)) is None:
                continue
            moved = run._replace(policy=fitting)
            took = self._simulations.seconds(moved, figures)
            if took < seconds * (1 - _FASTER):
                return moved, took
        return None

    def _in_best_order(self, best: Run) -> Run:
        """The run, or an improved one in another order if that is better."""
        program = self._ranking.program(best)
        for run in self._programs.other_orders(*best):
            if self._simulations.short(run):
                continue
            form = program.form.replace(overlap=run.policy.overlap)
            figures = self._programs.figures(form, run.order)
            self._ranking.add(run, program._replace(form=form, order=run.order, figures=figures))
            if self._ranking.score(run) < self._ranking.score(best):
                best = self._improved(run)
        return best

    def _with_fastest_variant(self, kept: list[Run]) -> list[Run]:
        """These runs, with the fastest variant in the place of the best of them."""
        best = min(kept, key=self._ranking.whole_score)
        starts = [best]
        if self._job.workload.copied > 1:  # a shape that is faster with guesses may be slower without them
            starts += [run for run in self._ranking if run.policy != best.policy][:_REFINED]
        fastest = min(map(self._fastest_variant, starts), key=self._ranking.whole_score)
        return [fastest, *(run for run in kept if run not in (best, fastest))]

    def _fastest_variant(self, run: Run) -> Run:
        """The fastest of a run and its variants, then of this one and its variants, as long as it changes."""
        for _ in range(_ROUNDS):
            policies = self._choices.variants(run.policy, self._fitting.short_in(run.order))
            fastest = self._simulations.fastest(run, [run._replace(policy=policy) for policy in policies])
            if fastest == run:
                break
            self._ranking.add_variant(fastest, run)
            run = fastest
        return run

    def _candidate(self, run: Run) -> Candidate:
        prediction, program = self._simulations.prediction(run), self._ranking.program(run)
        words = limits_in_words(run.policy, prediction, program.figures, program.solution, self._job)
        return Candidate(run.policy, prediction.report.order, prediction, words)
