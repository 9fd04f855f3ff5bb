"""The policy search: finds the best policy for a job on a described machine."""

from flexgen.search.find import find_policy

__all__ = ["find_policy"]
