"""The layout of hidden states between two layers, and of the ids at both ends of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from flexgen.layout.moves import Kind, Move, Route, Routes, along
from flexgen.layout.needs import Need
from flexgen.layout.topology import Topology
from flexgen.models import ModelSpec
from flexgen.policy import Policy, Tier
from flexgen.results.trace import LaneName
from flexgen.units import BLOCK, align


@dataclass(frozen=True)
class HiddenLayout:
    """The hidden states (rows, tokens, hidden) of one batch between two layers.

    Rows that the compute device uses in place stay there. The others are written to their home after each layer and
    loaded before the next one. rows: the number of rows of each tier. token_bytes: bytes of one token of one row.
    """

    rows: Mapping[Tier, range]
    token_bytes: int
    topology: Topology

    @cached_property
    def away(self) -> tuple[Tier, ...]:
        """The tiers whose rows move."""
        return tuple(tier for tier, rows in self.rows.items() if rows and not self.topology.in_place(tier))

    @property
    def count(self) -> int:
        """The number of rows."""
        return sum(map(len, self.rows.values()))

    @cached_property
    def resident(self) -> int:
        """The number of rows that stay on the compute device."""
        return sum(len(rows) for tier, rows in self.rows.items() if tier not in self.away)

    def only(self, rows: range) -> HiddenLayout:
        """The layout of some rows of the batch, numbered from 0."""
        some = {}
        for tier, own in self.rows.items():
            begin = min(max(own.start, rows.start), rows.stop)
            some[tier] = range(begin - rows.start, max(min(own.stop, rows.stop), begin) - rows.start)
        return replace(self, rows=some)

    def nbytes(self, tier: Tier, tokens: int) -> int:
        """Bytes of the tier's rows."""
        return len(self.rows[tier]) * tokens * self.token_bytes

    def home_bytes(self, tier: Tier, tokens: int) -> int:
        """The allocated bytes of the tier's rows: on disk, whole disk blocks."""
        return align(self.nbytes(tier, tokens), BLOCK)

    def away_bytes(self, tokens: int) -> int:
        """Bytes of the rows that cross the link, in whole disk blocks."""
        away = (self.nbytes(tier, tokens) for tier in self.rows if tier is not Tier.GPU)
        return align(sum(away), BLOCK)

    def homes(self, tokens: int) -> list[Need]:
        return [
            Need(tier, "activations", "home", self.home_bytes(tier, tokens))
            for tier, rows in self.rows.items()
            if rows
        ]

    def in_flight(self, tokens: int, slots: int) -> list[Need]:
        """The slots and staging for `slots` batches like this one."""
        needs = [Need(Tier.CPU, "activations", "staging", 2 * slots * self.home_bytes(Tier.DISK, tokens))]
        if not self.topology.shares_host_memory:
            needs.append(Need(Tier.GPU, "activations", "slots", slots * self.away_bytes(tokens)))
        return needs

    def load(self, tokens: int) -> Routes:
        """The routes from home to the compute device."""
        return tuple(self._route(tier, self.topology.inward(tier), tokens) for tier in self.away)

    def store(self, tokens: int) -> Routes:
        """The routes from the compute device to home."""
        return tuple(self._route(tier, self.topology.outward(tier), tokens) for tier in self.away)

    def _route(self, tier: Tier, lanes: tuple[LaneName, ...], tokens: int) -> Route:
        return along(tier, lanes, self.nbytes(tier, tokens), self.home_bytes(tier, tokens))


def hidden_layout(
    spec: ModelSpec, policy: Policy, rows: int, dtype: torch.dtype, topology: Topology
) -> HiddenLayout:
    """The layout of a batch of `rows` prompts."""
    return HiddenLayout(policy.activations.rows(rows), spec.hidden_size * dtype.itemsize, topology)


def activation_bytes(spec: ModelSpec, rows: int, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of the hidden states of `tokens` tokens of `rows` prompts, in whole disk blocks."""
    return align(rows * tokens * spec.hidden_size * dtype.itemsize, BLOCK)


@dataclass(frozen=True)
class IdLayout:
    """The ids of one batch, which are stored in host memory."""

    rows: int
    topology: Topology

    def load(self, tokens: int) -> Routes:
        """The route of `tokens` ids of each row to the compute device."""
        lanes = self.topology.inward(Tier.CPU)
        return (along(Tier.CPU, lanes, self._nbytes(tokens), 0),) if lanes else ()

    def store(self, tokens: int = 1) -> Routes:
        """The route of the next `tokens` ids of each row to host memory."""
        home = along(Tier.CPU, self.topology.outward(Tier.CPU), self._nbytes(tokens), 0)
        return (Route(Tier.CPU, (*home.moves, Move(LaneName.HOST, 0, Kind.RECORD))),)

    def _nbytes(self, tokens: int) -> int:
        return self.rows * tokens * torch.int64.itemsize
