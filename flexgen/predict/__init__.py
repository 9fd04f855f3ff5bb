"""Predicts the time and the memory of a policy on a described machine, without a run."""

from flexgen.predict.hardware import Hardware
from flexgen.predict.prediction import predict

__all__ = ["Hardware", "predict"]
