"""The engine: a model that is opened once and generates many times."""

from flexgen.engine.model import OptLM
from flexgen.runtime.stats import Stats

__all__ = ["OptLM", "Stats"]
