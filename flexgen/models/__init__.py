"""Models: specs, the computation of the layers, and checkpoints."""

from flexgen.models.attention import Attention
from flexgen.models.block import Block
from flexgen.models.checkpoint import open_model
from flexgen.models.embed import Head, InputEmbed
from flexgen.models.hub import HubOptions
from flexgen.models.layer import Chunk, Context, Layer, Weights
from flexgen.models.mlp import MLP
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
    "open_model",
]


def build_layers(spec: ModelSpec, sep_layer: bool = True) -> tuple[Layer, ...]:
    """The layers of a model: input embedding, transformer layers and head.

    sep_layer: attention and MLP are separate streaming units; otherwise a transformer layer is one unit. A layer
    with a parallel residual is always one unit, because its MLP needs the layer's input and not the result of
    attention.
    """
    middle: list[Layer] = []
    for index, layer in enumerate(spec.layers):
        apart = sep_layer and layer.residual != "parallel"
        middle += [Attention(spec, index), MLP(spec, index)] if apart else [Block(spec, index)]
    return InputEmbed(spec), *middle, Head(spec)
