"""Attention over a part of the tokens, and the exact merge of several parts.

A part is normalised by the exponentials of its own scores. The log of their sum says how much the part weighs against
the others, so attention over all tokens is the mean of the parts with these weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Partial(NamedTuple):
    """Attention over a part of the tokens.

    values (rows, heads, new, head_dim) float32: the attention if there were no other tokens. lse (rows, heads, new)
    float32: the log of the sum of the exponentials of the scores. Zero and -inf for a query that attends to no token.
    """

    values: Tensor
    lse: Tensor


def merge(parts: Sequence[Partial], dtype: torch.dtype) -> Tensor:
    """Attention over the tokens of all parts, (rows, heads, new, head_dim) in `dtype`. No token is in two parts.

    At most one part has the layer's sinks. A query that attends to no token results in zero.
    """
    values, lse = parts[0]
    for n, part in enumerate(parts[1:], 2):
        # NaN is the difference of two -inf. NaN in a part is also in its values, and stays.
        weight = torch.sigmoid(part.lse - lse).nan_to_num_(0.0)
        values = torch.lerp(values, part.values, weight.unsqueeze(-1))
        if n < len(parts):
            lse = torch.logaddexp(lse, part.lse)
    return values.to(dtype)
