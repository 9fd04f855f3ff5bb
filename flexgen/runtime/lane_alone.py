"""The work of one lane without that of the others, to time it alone."""

from __future__ import annotations

from collections.abc import Sequence

from flexgen.memory.transfer import Chains
from flexgen.results.trace import LaneName
from flexgen.runtime.executor import Work
from flexgen.schedule.steps import Step


class LaneAlone:
    """The part of a generation that runs on one lane, for some of its tokens."""

    can_finish = False

    def __init__(self, work: Work, lane: LaneName, tokens: Sequence[int]) -> None:
        self._work = work
        self._lane = lane
        self._tokens = tokens
        self.idle = work.idle

    def chains(self, step: Step) -> Chains:
        chains = self._work.chains(step._replace(token=self._tokens[step.token]))
        alone = (tuple(stage for stage in chain if stage.lane is self._lane) for chain in chains)
        return tuple(chain for chain in alone if chain)

    def finished(self, token: int) -> bool:
        return False
