"""Policies as data: tiers, shares, splits, and the policy itself."""

from flexgen.policy.policy import CODECS, STORED, SUM_TOLERANCE, Auto, Policy, Share, Split, Tier

__all__ = ["CODECS", "STORED", "SUM_TOLERANCE", "Auto", "Policy", "Share", "Split", "Tier"]
