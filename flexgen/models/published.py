"""The format of a model's published weights: which matrices it encodes, and the bytes of the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flexgen.formats import Encoding
from flexgen.formats.block_fp8 import BlockFP8
from flexgen.formats.fp4 import MXFP4
from flexgen.models.known import Format
from flexgen.models.layer import Layer
from flexgen.models.sources import Source
from flexgen.models.spec import EncodedWeight, WeightSpec

ENCODINGS: dict[Format, Encoding] = {
    "fp8": BlockFP8(".weight_scale_inv", 128, 128),
    "mxfp4 experts": MXFP4(),
}


def published(weight: WeightSpec, encodings: Sequence[Encoding]) -> EncodedWeight | None:
    """The tensors in which releases in the first of `encodings` usually store a weight; None for a plain one.

    The MXFP4 of gpt-oss is for experts only. Other formats are for all matrices but embeddings, routers and head.
    """
    if len(weight.shape) != 2 or not weight.encodable or weight.quantized or not encodings:
        return None
    encoding = encodings[0]
    for_experts = isinstance(encoding, MXFP4) and encoding.by_group
    if not weight.unit if for_experts else weight.looked_up or weight.name == "head.weight":
        return None
    rows, columns = weight.shape
    try:
        parts = encoding.parts((rows, columns))
    except ValueError:  # no matrix of this shape
        return None
    source = weight.sources[0]
    name = source.name.removesuffix(".weight")
    return EncodedWeight(
        encoding,
        tuple(
            WeightSpec(
                weight.name + part.suffix,
                part.shape,
                (Source(name + part.suffix, source.take),),
                dtype=part.read_as(part.dtypes[0]),
                encodable=False,
                quantized=True,
            )
            for part in parts
        ),
    )


def published_bytes(layers: Sequence[Layer], dtype: torch.dtype, form: Format | None) -> int:
    """The bytes of all weights of `layers`. dtype: that of the model, in which the weights without a format are.

    Names of files, headers and padding are not included.
    """
    encodings = [ENCODINGS[form]] if form else []
    weights = {weight.key: weight for layer in layers for weight in layer.weights}
    total = 0
    for weight in weights.values():
        encoded = published(weight, encodings)
        total += sum(part.nbytes(dtype) for part in (encoded.parts if encoded else (weight,)))
    return total
