"""What a policy takes on a described machine, before anything runs."""

from flexgen.predict.hardware import Hardware
from flexgen.predict.prediction import predict

__all__ = ["Hardware", "predict"]
