"""Policies that fit the machine, from the solutions of linear programs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from flexgen.errors import CapacityError
from flexgen.policy import Policy, Tier
from flexgen.predict.job import Job
from flexgen.search.choices import Choices
from flexgen.search.linear import CLASSES, Shares, Solution, one_codec_each
from flexgen.search.moves import Short, filled, squeezed
from flexgen.search.programs import Programs, Solved
from flexgen.search.simulations import Run, Simulations
from flexgen.units import format_bytes

_TRIES = 8
"""The maximum number of times that a program is solved again with a smaller capacity."""
_MARGIN = 1.05
"""The bytes by which a capacity is reduced, as a multiple of the bytes that were missing."""


class Fitting:
    """Turns solutions into policies whose memory plans fit the machine.

    A program does not count everything that a plan does: its shares are not yet rounded, and slots have the size of
    the largest layer, which may be a head.
    """

    def __init__(self, job: Job, choices: Choices, programs: Programs, simulations: Simulations) -> None:
        self._job = job
        self._choices = choices
        self._programs = programs
        self._simulations = simulations
        self._weights_given = "weights" in choices.fixed

    def short_in(self, order: str | None) -> Short:
        """The tiers that a policy exceeds in an order."""
        return lambda policy: self._simulations.short(Run(policy, order))

    def runs(self, solved: Solved) -> Iterator[tuple[Run, Solved]]:
        """The solution as policies that fit, each with the program that it comes from.

        The free memory that rounding leaves is filled with weights. Overlap is tried even if the program found no
        room for it.
        """
        policy = self._rounded(solved)
        if policy is None:
            return
        tiers, short = self._choices.tiers, self.short_in(solved.order)
        yield Run(policy if self._weights_given else filled(policy, tiers, short), solved.order), solved
        given = self._weights_given or "overlap" in self._choices.fixed or self._job.order
        if given or policy.overlap:
            return
        if overlapped := squeezed(policy.replace(overlap=True), tiers, short):
            form = solved.form.replace(overlap=True)
            own = solved._replace(form=form, figures=self._programs.figures(form, solved.order))
            yield Run(filled(overlapped, tiers, short), solved.order), own

    def _rounded(self, solved: Solved) -> Policy | None:
        """The solution in whole percentages as a policy that fits, or None.

        If the policy exceeds a tier, the program is solved again with a capacity that is smaller by the excess. If
        that has no solution, weights are moved to slower tiers.
        """
        capacity, solution = self._programs.capacity.copy(), solved.solution
        first = self._choices.rounded(solved.form, solution.shares)
        for _ in range(_TRIES):
            policy = self._choices.rounded(solved.form, solution.shares)
            _, short = self._simulations.plan(Run(policy, solved.order))
            if (short <= 0).all():
                return policy
            capacity -= _MARGIN * np.maximum(short, 0)
            again = one_codec_each(solved.figures, capacity, self._choices.given)
            if again is None:
                break
            solution = again
        if self._weights_given:
            return None
        return squeezed(first, self._choices.tiers, self.short_in(solved.order))

    # If no solution fits

    def smallest(self) -> tuple[Run, Solved]:
        """The smallest block, without overlap unless it is given, with the placement that exceeds the tiers least.

        Raises CapacityError, with the shortage of each tier, if it does not fit.
        """
        solved, short = self._programs.least_short(self._smallest_form()), self.short_in(self._job.order)
        solution = solved.solution
        for shares in self._whole_shares(solved):
            if not short(self._choices.rounded(solved.form, shares)):
                solution = Solution(shares, solution.seconds, solution.saved)
        solved = solved._replace(solution=solution)
        run = Run(self._choices.rounded(solved.form, solution.shares), solved.order)
        if self._simulations.short(run):
            raise self._too_small(run)
        return run, solved

    def _smallest_form(self) -> Policy:
        form = next(self._choices.forms())
        size, numbers = next(iter(self._choices.shapes(form).items()))
        form = form.replace(gpu_batch_size=size, num_gpu_batches=numbers[0])
        return form if "overlap" in self._choices.fixed else form.replace(overlap=False)

    def _whole_shares(self, solved: Solved) -> Iterator[Shares]:
        """The placements with each class on one tier. Split data needs buffers for each of its parts, so these
        placements need the fewest."""
        free = [what for what in CLASSES if what not in self._choices.fixed]
        ways = [[column for column in solved.figures.columns if column.what == what] for what in free]
        for way in itertools.product(*ways):
            yield {**self._choices.given, **dict.fromkeys(way, 1.0)}

    def _too_small(self, run: Run) -> CapacityError:
        """The error with the shortage of the smallest policy."""
        hardware, (plan, short) = self._job.hardware, self._simulations.plan(run)
        limits: dict[Tier, int | None] = {tier: hardware.capacity.get(tier) for tier in Tier}
        limits[Tier.DISK] = hardware.capacity[Tier.DISK] - plan.on(Tier.DISK, "weights")
        missing = ", ".join(
            f"{format_bytes(count)} of {tier}" for tier, count in zip(Tier, short, strict=True) if count > 0
        )
        return CapacityError(
            f"no policy for {self._job.spec.name} fits {hardware.name}, which is short by {missing}: "
            f"{plan.shortage(limits)}, with "
            f"{run.policy.num_gpu_batches} x {run.policy.gpu_batch_size} prompts in flight. Use a smaller model, "
            "shorter prompts, codecs (lossy), or a machine with more memory"
        )
