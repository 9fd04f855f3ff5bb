"""The engine: `OptLM`, a model that is opened once and called many times."""

from flexgen.engine.model import OptLM
from flexgen.runtime.stats import Stats

__all__ = ["OptLM", "Stats"]
