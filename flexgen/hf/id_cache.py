"""The cache for generation modes that recompute: it stores ids in place of keys and values."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from flexgen.errors import RequestError, UnsupportedError

CACHE_NAME = (
    "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"
)
"""The name of the cache in arguments and results. Older versions of transformers use the second name."""


class IdCache(Cache):
    """A `Cache` for the generation loops of transformers that stores only ids.

    A loop passes the cache and the new ids. `forward` prepends the cached ids and computes all positions again, so
    the ids are the only memory between two steps.

    ids: int64 (rows, positions) in host memory, including padding; None before the first forward pass.
    """

    def __init__(self, ids: Tensor | None = None) -> None:
        super().__init__(layers=[])
        self.ids = ids

    def __repr__(self) -> str:
        return f"{type(self).__name__}(positions={self.get_seq_length()})"

    def with_new(self, new: Tensor) -> Tensor:
        """The cached ids followed by `new` (rows, positions). Raises RequestError if the numbers of rows differ."""
        if self.ids is None:
            return new
        if new.shape[0] != len(self.ids):
            raise RequestError(
                f"the cache has {len(self.ids)} rows and input_ids have {new.shape[0]}; pass the rows of the cache"
            )
        return torch.cat([self.ids, new.to("cpu", torch.int64)], dim=1)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.ids is None else self.ids.shape[1]

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1  # no limit

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` positions.

        A positive number is the length to keep, as in older versions of transformers.
        """
        if self.ids is not None and tokens_to_remove:
            self.ids = self.ids[:, :tokens_to_remove]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.ids is not None:
            self.ids = self.ids[indices.cpu()]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.ids is not None:
            self.ids = self.ids.repeat_interleave(repeats, dim=0)

    def reset(self) -> None:
        self.ids = None

    @property
    def batch_size(self) -> int:
        return -1 if self.ids is None else len(self.ids)

    @property
    def is_linear(self) -> list[bool]:
        # One entry although there are no layers: all([]) would mean a linear cache, which has no positions.
        return [False]


def read_cache(**named: Any) -> IdCache | None:
    """The cache, passed under one of its names; None if there is none.

    Raises UnsupportedError for a cache of keys and values.
    """
    for name, cache in named.items():
        if isinstance(cache, IdCache):
            return cache
        if cache is not None:
            raise UnsupportedError(
                f"{name}: a {type(cache).__name__} is not supported, because flexgen stores keys and values on the "
                "tiers of the policy, and only during a call. Pass the cache that forward(..., use_cache=True) "
                "returned"
            )
    return None
