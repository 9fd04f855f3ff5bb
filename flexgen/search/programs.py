"""Solves the linear program of each block shape: the minimum seconds, and the placement that reaches them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np

from flexgen.policy import Policy, Tier
from flexgen.predict.job import Job
from flexgen.schedule.orders import ORDERS, Slots
from flexgen.search.choices import Choices
from flexgen.search.corners import Corners
from flexgen.search.linear import Figures, Solution, blocks, one_codec_each
from flexgen.search.simulations import Run

_BEST = 8
"""The number of best shapes of a form whose next smaller and next larger batch sizes are tried too."""


class Solved(NamedTuple):
    """A solved program: blocks of a form in an order (None: the form's own), and the best placement.

    seconds: the minimum time of the whole workload.
    """

    seconds: float
    form: Policy
    order: str | None
    figures: Figures
    solution: Solution


def by_seconds(solved: list[Solved]) -> list[Solved]:
    """Sorted, best first."""
    return sorted(solved, key=lambda one: one.seconds)


class Programs:
    """The linear programs of a job. `considered` counts the solved programs.

    slots: the maximum slots of an order that is not the policy's own; None sets no limit.
    """

    def __init__(self, job: Job, choices: Choices, slots: Slots | None) -> None:
        self._job = job
        self._choices = choices
        self._slots = slots
        self._corners = cache(lambda order: Corners(replace(job, order=order)))
        self.capacity = np.array([float(job.hardware.capacity.get(tier, 0)) for tier in Tier])
        self.considered = 0

    def all(self) -> list[Solved]:
        """All solutions, best first: of every second batch size, then of the neighbours of the best sizes."""
        solved: list[Solved] = []
        for form in self._choices.forms():
            shapes = self._choices.shapes(form)
            sizes = list(shapes)
            found = self._of_shapes(form, {size: shapes[size] for size in sizes[::2]})
            best = {one.form.gpu_batch_size for one in by_seconds(found)[:_BEST]}
            near = {n + side for n, size in enumerate(sizes) if size in best for side in (-1, 1)}
            # The smallest size is in the first half, so no other size can fit if none of that half does.
            found += self._of_shapes(form, {sizes[n]: shapes[sizes[n]] for n in near if 0 <= n < len(sizes)})
            solved += found
        return by_seconds(solved)

    def _of_shapes(self, form: Policy, shapes: Mapping[int, list[int]]) -> list[Solved]:
        solved = []
        for size, numbers in sorted(shapes.items()):
            fitted = False
            for batches in numbers:
                shaped = self._choices.shaped(form, size, batches)
                if shaped is None:
                    break  # nor with more batches
                one = self._overlapped(shaped)
                if one is None:
                    break  # more batches need more memory
                fitted = True
                solved.append(one)
            if not fitted and numbers[0] == 1:
                break  # so do larger batches
        return solved

    def _overlapped(self, form: Policy) -> Solved | None:
        """The solution with overlap, or without it if there is no room for the buffers of overlap."""
        if "overlap" in self._choices.fixed or self._job.order:
            return self.of(form, self._job.order)
        return self.of(form.replace(overlap=True), None) or self.of(form.replace(overlap=False), None)

    def of(self, form: Policy, order: str | None) -> Solved | None:
        """The solution of a form, or None if no placement fits."""
        figures = self.figures(form, order)
        self.considered += 1
        if solution := one_codec_each(figures, self.capacity, self._choices.given):
            return self._solved(form, order, figures, solution)
        return None

    def least_short(self, form: Policy) -> Solved:
        """The solution of a form with no placement that fits, with the smallest excess in bytes."""
        figures = self.figures(form, self._job.order)
        solution = one_codec_each(figures, self.capacity, self._choices.given, elastic=True)
        assert solution is not None
        return self._solved(form, self._job.order, figures, solution)

    def _solved(self, form: Policy, order: str | None, figures: Figures, solution: Solution) -> Solved:
        return Solved(solution.seconds * blocks(self._job.workload, form), form, order, figures, solution)

    def figures(self, form: Policy, order: str | None) -> Figures:
        """The coefficients of a form's program."""
        return self._corners(order).figures(form, self._choices.columns_of(form))

    def other_orders(self, policy: Policy, order: str | None) -> Iterator[Run]:
        """The policy in each other order that the search may choose. `overlap` is set to match the order."""
        if self._job.order:
            return
        topology, batches = self._job.hardware.topology, policy.num_gpu_batches
        now = topology.choose_order(order, policy, batches)
        for other in ORDERS.values():
            asked = policy.replace(overlap=not other.serial)
            refused = "overlap" in self._choices.fixed and asked.overlap != policy.overlap
            refused |= self._slots is not None and not other.slots.fit(self._slots)
            if not (refused or other.for_comparison or other is now):
                own = topology.choose_order(None, asked, batches)
                yield Run(asked, None if own is other else other.name)
