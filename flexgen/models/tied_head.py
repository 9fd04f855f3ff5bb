"""LM heads that a config calls tied, although the files store them next to the embedding."""

from __future__ import annotations

import hashlib
import logging

import torch

from flexgen.models.spec import WeightSpec
from flexgen.models.tensor_files import TensorFiles
from flexgen.user_cache import cache_folder, keep

logger = logging.getLogger(__name__)

_PIECE = 16 << 20
"""Bytes of each tensor that are in memory at once."""


def has_own_values(files: TensorFiles, embed: WeightSpec, head: WeightSpec) -> bool:
    """Whether a stored head differs from the embedding. If it does, flexgen uses it, as transformers does.

    The tensors are read up to the first difference. If there is none, the result is cached for the user, and the
    tensors are not read again until the files change.
    """
    if files.encoded(embed) or files.encoded(head):
        return files.encoded(embed) is None
    if files.dtype_of(head) != files.dtype_of(embed):
        return True
    key = hashlib.sha256(f"{files.identity}\n{embed.key}\n{head.key}".encode("utf-8", "surrogatepass"))
    equal = cache_folder("tied_heads") / key.hexdigest()[:32]
    if equal.exists():
        return False
    if _differ(files, embed, head):
        return True
    try:
        keep(equal, b"")
    except OSError as error:
        logger.debug("cannot cache that the head of %s is tied: %s", files.directory, error)
    return False


def _differ(files: TensorFiles, embed: WeightSpec, head: WeightSpec) -> bool:
    dtype, count = files.dtype_of(embed), embed.shape[0]
    step = max(_PIECE * count // embed.nbytes(dtype), 1)
    pieces = (range(first, min(first + step, count)) for first in range(0, count, step))
    return not all(
        torch.equal(files.read(embed, dtype, rows), files.read(head, dtype, rows)) for rows in pieces
    )
