"""Models: specs, the computation of the layers, and checkpoints."""

from flexgen.models.build import build_layers, one_of_each_kind
from flexgen.models.checkpoint import open_model
from flexgen.models.hub import HubOptions
from flexgen.models.layer import Chunk, Context, Layer, Weights
from flexgen.models.spec import ModelSpec, WeightSpec

__all__ = [
    "Chunk",
    "Context",
    "HubOptions",
    "Layer",
    "ModelSpec",
    "WeightSpec",
    "Weights",
    "build_layers",
    "one_of_each_kind",
    "open_model",
]
