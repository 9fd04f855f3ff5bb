"""transformers' loss of a causal LM."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flexgen.errors import RequestError
from flexgen.runtime.request import Request

IGNORED_LABEL = -100


def check_labels(labels: Tensor, shape: tuple[int, ...], vocab: int) -> None:
    """Raise RequestError unless labels have this shape and are ids or -100."""
    if tuple(labels.shape) != shape:
        raise RequestError(
            f"labels have shape {tuple(labels.shape)}; they must be those of input_ids, {shape}"
        )
    wrong = labels[(labels != IGNORED_LABEL) & ((labels < 0) | (labels >= vocab))]
    if len(wrong):
        raise RequestError(
            f"labels have the id {int(wrong[0])}; the vocabulary is 0 to {vocab - 1}, and {IGNORED_LABEL} is for "
            "positions without a label"
        )


def loss_of(logits: Tensor, labels: Tensor, request: Request) -> Tensor:
    """transformers' loss of a causal LM, one row's logits in float32 at a time.

    Of the padding there are no logits, so that labels count where both their own position and the one before, which
    tells them, are in the row.
    """
    targets = torch.full_like(labels, IGNORED_LABEL)
    for target, label, columns in zip(targets, labels, request.columns, strict=True):
        first, last = int(columns[0]), int(columns[-1])
        target[first:last] = label[first + 1 : last + 1]
    total = sum(
        F.cross_entropy(row.float(), target, ignore_index=IGNORED_LABEL, reduction="sum")
        for row, target in zip(logits, targets, strict=True)
    )
    return total / (targets != IGNORED_LABEL).sum()
