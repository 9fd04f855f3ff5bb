"""In pieces of which size weights and cache move."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flexgen.units import BLOCK, KIB, MIB


@dataclass(frozen=True)
class PieceSizes:
    """Sizes of pieces of a layer's weights, and of the pages of a KV cache, which have some tokens of every row.

    The page of a cache on disk that is being filled stays in host memory, one for each batch and layer.
    `page_bytes` and `page_head_bytes` bound what these take, whatever the number of new tokens.
    """

    weight_bytes: int = 1 * MIB
    """Weights of a layer are not divided into smaller pieces: smaller reads and copies are slower."""

    read_bytes: int = 16 * MIB
    """Bytes of a weight that are read, and converted or encoded, at once while a model opens: enough for all threads,
    and little compared with a layer."""

    memory_page_tokens: int = 128
    """Tokens of a page in memory: whole pages move, and compiled kernels of the CPU read page by page."""

    result_bytes: int = 16 * MIB
    """Bytes of logits or hidden states that leave the device at once, on their way to the caller. A copy of this size
    takes a link far longer than starting it."""

    page_bytes: int = 1 * MIB
    """Bytes of a page on disk, at least: it is written as one, and a disk reaches its rate with writes of this
    size."""

    page_head_bytes: int = 1 * KIB
    """Bytes of one head's keys in a page on disk, at least. They are contiguous in memory: attention over shorter
    runs takes longer."""

    page_tokens: int = 128
    """Tokens of a page on disk, at most."""

    choice_bytes: int = 16 * KIB
    """Values that sparse attention reads from disk at once, of one row and K/V head, at least. A disk serves reads of
    one block at a small part of the rate of long ones: skipping what is between them would gain nothing."""

    choice_tokens: int = 128
    """Of these, at most, unless not even that makes whole blocks."""

    def tokens_on_disk(self, heads: int, head_bytes: int) -> int:
        """Tokens of a page on disk, where a token has `heads` keys and values of `head_bytes` each."""
        wanted = max(-(-self.page_bytes // (heads * head_bytes)), -(-self.page_head_bytes // head_bytes))
        return min(wanted, self.page_tokens)

    def chosen_together(self, token_bytes: int) -> int:
        """Tokens that are read from disk together, where one takes `token_bytes` in a head: whole disk blocks."""
        whole = BLOCK // math.gcd(BLOCK, token_bytes)
        wanted = -(-self.choice_bytes // (whole * token_bytes))
        return whole * max(min(wanted, self.choice_tokens // whole), 1)
