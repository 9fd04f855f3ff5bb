"""Groups of prompts that begin with the same ids: a tree of shared prefixes.

A job may have prompts of a common instruction, one of several documents, and a question. Blocks of prompts with the
same document share the instruction and the document. Each is a part of their prefix, which is computed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from flexgen.layout.prefix import SHORTEST
from flexgen.runtime.request import Request
from flexgen.workload import Workload

MOST_PARTS = 8
"""The maximum number of parts of a prefix. Attention runs once for each part and new token."""


@dataclass(frozen=True)
class PrefixGroup:
    """Prompts that run in blocks of their own.

    rows: their numbers in the request.
    ends: the length of the prefix after each of its parts; () if they share none.
    """

    rows: tuple[int, ...]
    ends: tuple[int, ...] = ()

    @property
    def shared(self) -> int:
        """The number of tokens of the whole prefix."""
        return self.ends[-1] if self.ends else 0

    def prompts(self, request: Request) -> Request:
        """The prompts of the group without their prefix, in the order of `rows`."""
        return request.only(self.rows).after(self.shared)

    def workload(self, request: Request, gen_len: int) -> Workload:
        """The workload of the group's blocks."""
        longest = max(len(request.prompts[row]) for row in self.rows)
        return Workload(longest, gen_len, len(self.rows), self.shared, cuts=self.ends[:-1])


@dataclass(frozen=True)
class BlockPasses:
    """The passes that blocks of a call run, for the decision whether a group has blocks of its own.

    block_size: the maximum number of prompts of a block. per_block: the passes of a block. positions: the number of
    positions that the device computes in the time of one pass, which it takes for any number of rows.
    """

    block_size: int
    per_block: int
    positions: float

    def extra(self, rows: int) -> float:
        """The time in positions of the further passes of a call if `rows` of its prompts get blocks of their own.

        There is one pass for the prefix. The blocks are more by the free places in the last one: rows that run with
        others take a share of a block.
        """
        return self.positions * (1 + -rows % self.block_size / self.block_size * self.per_block)


def one_group(request: Request, shared: int) -> PrefixGroup:
    """All prompts, which share the first `shared` ids."""
    return PrefixGroup(tuple(range(len(request.prompts))), (shared,) if shared else ())


def prefix_groups(request: Request, root: int, passes: BlockPasses) -> list[PrefixGroup]:
    """The groups of a call, in an order in which blocks with the same parts of a prefix are adjacent. If only some
    adjacent prompts are sorted together (`Request.sorted_in`), the groups have only these.

    root: the number of ids that all prompts share as the first part of their prefix, or 0.

    Prompts get a group if it has at least `SHORTEST` further common ids and saves more positions than its further
    passes cost. Memory and the traffic of the cache are also saved, but not counted. The other prompts run in the
    blocks of the group with the shorter prefix.
    """
    together = request.sorted_in or len(request.prompts)
    groups: list[PrefixGroup] = []
    for begin in range(0, len(request.prompts), together):
        rows = range(begin, min(begin + together, len(request.prompts)))
        some = _groups(request.only(rows), root, passes)
        if groups and len(some) == 1 and len(some[0].ends) == len(groups[-1].ends) == bool(root):
            groups[-1] = PrefixGroup((*groups[-1].rows, *rows), some[0].ends)
        else:
            groups += [PrefixGroup(tuple(begin + n for n in group.rows), group.ends) for group in some]
    return groups


def _groups(request: Request, root: int, passes: BlockPasses) -> list[PrefixGroup]:
    """The groups of prompts that are sorted together."""
    keys = [prompt.astype(">u4").tobytes() for prompt in request.prompts]  # in the order of the ids
    order = sorted(range(len(keys)), key=keys.__getitem__)
    common = np.array([_common(request.prompts[a], request.prompts[b]) for a, b in pairwise(order)])
    lengths = np.array([len(request.prompts[row]) for row in order])
    tree = _Tree(np.minimum(common, np.minimum(lengths[:-1], lengths[1:]) - 1), passes)
    ends = (root,) if root else ()
    groups, rest = tree.split(range(len(order)), ends)
    if rest:
        groups.insert(0, (rest, ends))
    return [PrefixGroup(tuple(sorted(order[n] for n in places)), ends) for places, ends in groups]


_Group = tuple[list[int], tuple[int, ...]]
"""Places in the order of the ids, and the ends of the parts of their prefix."""


@dataclass(frozen=True)
class _Tree:
    """Prompts in the order of their ids. common: the number of ids that each may share with the next one."""

    common: np.ndarray
    passes: BlockPasses

    def split(self, places: range, ends: tuple[int, ...]) -> tuple[list[_Group], list[int]]:
        """The groups of these prompts, which all share the last of `ends`, and the prompts without a group."""
        shared = ends[-1] if ends else 0
        groups: list[_Group] = []
        grouped: set[int] = set()
        waiting = list(self._runs(places, shared + SHORTEST))[::-1] if len(ends) < MOST_PARTS else []
        while waiting:
            run = waiting.pop()
            within = self.common[run.start : run.stop - 1]
            most, least = int(within.max()), int(within.min())
            if (len(run) - 1) * (most - shared) <= self.passes.positions:
                continue  # no part of it saves anything either
            if not self._saves(len(run), least - shared):
                waiting += list(self._runs(run, least + 1))[::-1]
                continue
            inner, rest = self.split(run, (*ends, least))
            # The few that are left when others have longer prefixes may not be worth blocks of their own.
            if rest and not inner or self._saves(len(rest), least - shared):
                inner.insert(0, (rest, (*ends, least)))
            if len(inner) == 1 and (deeper := inner[0][1][len(ends) + 1 :]):  # nothing else uses this part
                inner = [(inner[0][0], (*ends, *deeper))]
            groups += inner
            grouped.update(place for some, _ in inner for place in some)
        return groups, [place for place in places if place not in grouped]

    def _saves(self, rows: int, tokens: int) -> bool:
        return rows > 1 and (rows - 1) * tokens > self.passes.extra(rows)

    def _runs(self, places: range, tokens: int) -> Iterator[range]:
        """The longest runs of two or more adjacent prompts that share at least `tokens` ids."""
        unlike = places.start + 1 + np.flatnonzero(self.common[places.start : places.stop - 1] < tokens)
        for begin, end in pairwise((places.start, *unlike.tolist(), places.stop)):
            if end - begin > 1:
                yield range(begin, end)


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """The number of ids with which both prompts begin."""
    most = min(len(one), len(other))
    unlike = np.flatnonzero(one[:most] != other[:most])
    return int(unlike[0]) if len(unlike) else most


def covering(groups: Sequence[PrefixGroup], request: Request, gen_len: int) -> list[Workload]:
    """Workloads that need at least the memory of any block of the groups, one for each number of parts of a prefix.
    Those of the most prompts come first."""
    by_depth: dict[int, list[PrefixGroup]] = {}
    for group in groups:
        by_depth.setdefault(len(group.ends), []).append(group)
    prompts = len(request.prompts)
    found = []
    for depth, some in by_depth.items():
        parts = np.array([np.diff(group.ends, prepend=0) for group in some]).reshape(len(some), depth)
        ends: list[int] = parts.max(axis=0).cumsum().tolist()
        prefix = ends[-1] if ends else 0
        own = max(group.prompts(request).longest for group in some)
        workload = Workload(prefix + own, gen_len, prompts, prefix, cuts=tuple(ends[:-1]))
        found.append((sum(len(group.rows) for group in some), workload))
    return [workload for _, workload in sorted(found, key=lambda pair: -pair[0])]
