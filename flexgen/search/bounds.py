"""What the linear programs say of every shape of a block: seconds that no placement in it gets below, and where."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch

from flexgen.models import ModelSpec
from flexgen.policy import Policy, Tier
from flexgen.predict.hardware import Hardware
from flexgen.schedule.orders import ORDERS, Slots
from flexgen.search.choices import Choices
from flexgen.search.linear import Corners, Figures, Solution, one_codec_each
from flexgen.search.simulations import Run, blocks
from flexgen.workload import Workload

_BEST = 8
"""Shapes, the best of a form, whose batches are tried a little smaller and a little larger too."""


class Bound(NamedTuple):
    """Of blocks of a form in an order (None: the one that it asks for): seconds of the whole workload."""

    seconds: float
    form: Policy
    order: str | None
    figures: Figures
    solution: Solution


def within(wanted: Slots, held: Slots) -> bool:
    """Whether there are as many of each kind as are wanted."""
    return all(getattr(wanted, f.name) <= getattr(held, f.name) for f in fields(Slots))


def by_seconds(bounds: list[Bound]) -> list[Bound]:
    """Best first."""
    return sorted(bounds, key=lambda bound: bound.seconds)


class Bounds:
    """Those of one model, machine and workload, within its capacities. `order`: the one that is settled, if one is;
    `slots`: the most that another order than a policy's own may want. `considered` counts the linear programs."""

    def __init__(
        self,
        spec: ModelSpec,
        hardware: Hardware,
        workload: Workload,
        choices: Choices,
        dtype: torch.dtype,
        order: str | None,
        slots: Slots | None,
    ) -> None:
        self._hardware = hardware
        self._workload = workload
        self._choices = choices
        self._order = order
        self._slots = slots
        self._corners = cache(partial(Corners, spec, hardware, workload, dtype))
        self.capacity = np.array([float(hardware.capacity.get(tier, 0)) for tier in Tier])
        self.considered = 0

    def all(self) -> list[Bound]:
        """Best first. Every other size of a batch, then those beside the best of them."""
        shapes = self._choices.shapes()
        sizes = list(shapes)
        bounds: list[Bound] = []
        for form in self._choices.forms():
            found = self._of_shapes(form, {size: shapes[size] for size in sizes[::2]})
            best = {bound.form.gpu_batch_size for bound in by_seconds(found)[:_BEST]}
            near = {n + side for n, size in enumerate(sizes) if size in best for side in (-1, 1)}
            # Where no size of the first half fits, a smaller one was among them: the first.
            found += self._of_shapes(form, {sizes[n]: shapes[sizes[n]] for n in near if 0 <= n < len(sizes)})
            bounds += found
        return by_seconds(bounds)

    def _of_shapes(self, form: Policy, shapes: Mapping[int, list[int]]) -> list[Bound]:
        bounds = []
        for size, numbers in sorted(shapes.items()):
            fitted = False
            for batches in numbers:
                bound = self._overlapped(form.replace(gpu_batch_size=size, num_gpu_batches=batches))
                if bound is None:
                    break  # more of them need more
                fitted = True
                bounds.append(bound)
            if not fitted and numbers[0] == 1:
                break  # and so do larger ones
        return bounds

    def _overlapped(self, form: Policy) -> Bound | None:
        """Without overlap only where its buffers leave no room."""
        if "overlap" in self._choices.fixed or self._order:
            return self.of(form, self._order)
        return self.of(form.replace(overlap=True), None) or self.of(form.replace(overlap=False), None)

    def of(self, form: Policy, order: str | None) -> Bound | None:
        """None where nothing of the form fits."""
        figures = self.figures(form, order)
        self.considered += 1
        if solution := one_codec_each(figures, self.capacity, self._choices.given):
            return self._bound(form, order, figures, solution)
        return None

    def least_short(self, form: Policy) -> Bound:
        """The placement of a form of which nothing fits that takes fewest bytes too much."""
        figures = self.figures(form, self._order)
        solution = one_codec_each(figures, self.capacity, self._choices.given, elastic=True)
        assert solution is not None
        return self._bound(form, self._order, figures, solution)

    def _bound(self, form: Policy, order: str | None, figures: Figures, solution: Solution) -> Bound:
        return Bound(solution.seconds * blocks(self._workload, form), form, order, figures, solution)

    def figures(self, form: Policy, order: str | None) -> Figures:
        """The coefficients of its program."""
        return self._corners(order).figures(form, self._choices.columns)

    def other_orders(self, policy: Policy, order: str | None) -> Iterator[Run]:
        """The policy in every other order that may be chosen; in all but one of them it overlaps."""
        if self._order:
            return
        topology, batches = self._hardware.topology, policy.num_gpu_batches
        now = topology.choose_order(order, policy, batches)
        for other in ORDERS.values():
            asked = policy.replace(overlap=not other.serial)
            refused = "overlap" in self._choices.fixed and asked.overlap != policy.overlap
            refused |= self._slots is not None and not within(other.slots, self._slots)
            if not (refused or other.for_comparison or other is now):
                own = topology.choose_order(None, asked, batches)
                yield Run(asked, None if own is other else other.name)
