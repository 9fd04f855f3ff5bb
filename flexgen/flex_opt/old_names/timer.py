"""FlexGen 0.1 has its timers here."""

from flexgen.flex_opt import timers

__all__ = ["timers"]
