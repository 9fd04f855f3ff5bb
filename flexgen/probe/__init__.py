"""The measurement of a machine: each figure for predictions, measured with the code of the engine."""

from flexgen.probe.effort import Effort
from flexgen.probe.machine import measure

__all__ = ["Effort", "measure"]
