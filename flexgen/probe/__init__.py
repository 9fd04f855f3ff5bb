"""Measures a machine: each figure that a prediction needs, through the code that runs there in the engine."""

from flexgen.probe.effort import Effort
from flexgen.probe.machine import measure

__all__ = ["Effort", "measure"]
