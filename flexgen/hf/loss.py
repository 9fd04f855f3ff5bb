"""The loss of a causal LM, as in transformers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flexgen.errors import RequestError
from flexgen.runtime.request import Request

IGNORED_LABEL = -100


def check_labels(labels: Tensor, shape: tuple[int, ...], vocab: int) -> None:
    """Raise RequestError unless labels have this shape and each is an id or -100."""
    if tuple(labels.shape) != shape:
        raise RequestError(
            f"labels have shape {tuple(labels.shape)}; they must have the shape of input_ids, {shape}"
        )
    wrong = labels[(labels != IGNORED_LABEL) & ((labels < 0) | (labels >= vocab))]
    if len(wrong):
        raise RequestError(
            f"labels contain the id {int(wrong[0])}; the vocabulary is 0 to {vocab - 1}: use {IGNORED_LABEL} for "
            "positions without a label"
        )


def loss_of(logits: Tensor, labels: Tensor, request: Request) -> Tensor:
    """The loss of a causal LM, as in transformers. It converts the logits of one row at a time to float32.

    Padding has no logits. So a label counts only if its position and the one before it, which predicts it, are both
    in the row.
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
