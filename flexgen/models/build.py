"""The layers of a model, from its spec."""

from __future__ import annotations

from collections.abc import Sequence

from flexgen.models.attention import Attention
from flexgen.models.block import Block
from flexgen.models.embed import Head, InputEmbed
from flexgen.models.layer import Layer
from flexgen.models.mixture import feed_forward
from flexgen.models.spec import ModelSpec


def one_of_each_kind(layers: Sequence[Layer]) -> list[Layer]:
    """The last one of the layers of each class that share a `LayerSpec`. They differ in nothing but their names."""
    # By identity: to compare long specs takes longer than to ask a few layers more.
    return list({(type(layer), id(layer.layer_spec)): layer for layer in layers}.values())


def build_layers(spec: ModelSpec, sep_layer: bool = True) -> tuple[Layer, ...]:
    """The layers of a model: input embedding, transformer layers and head.

    sep_layer: attention and MLP are separate streaming units; otherwise a transformer layer is one unit. A layer
    with a parallel residual is always one unit, because its MLP needs the layer's input and not the result of
    attention.
    """
    middle: list[Layer] = []
    for index, layer in enumerate(spec.layers):
        apart = sep_layer and layer.residual != "parallel"
        middle += [Attention(spec, index), feed_forward(spec, index)] if apart else [Block(spec, index)]
    return InputEmbed(spec), *middle, Head(spec)
