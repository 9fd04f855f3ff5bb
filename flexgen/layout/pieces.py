"""The sizes of the pieces in which weights and cache move."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flexgen.units import BLOCK, KIB, MIB


@dataclass(frozen=True)
class PieceSizes:
    """Sizes of pieces of a layer's weights, and of the pages of a KV cache. A page has a few tokens of every row.

    The page of a cache on disk that is being filled stays in host memory, one for each batch and layer.
    `page_bytes` and `page_head_bytes` limit the memory of these pages, independent of the number of new tokens.
    """

    weight_bytes: int = 1 * MIB
    """The minimum size of a piece of a layer's weights: smaller reads and copies are slower."""

    read_bytes: int = 16 * MIB
    """Bytes of a weight that are read, and converted or encoded, at once when a model is opened. They keep all
    threads busy and are few compared with a layer."""

    thread_bytes: int = 1 * MIB
    """The same where each thread reads pieces of its own. A piece stays in the cache of a core until it is checked,
    encoded and stored."""

    memory_page_tokens: int = 128
    """Tokens per page in memory. Whole pages move, and the compiled CPU kernels read page by page."""

    result_bytes: int = 16 * MIB
    """Bytes of logits or hidden states that leave the device at once, on their way to the caller. A copy of this size
    takes a link far longer than starting it."""

    page_bytes: int = 1 * MIB
    """The minimum bytes of a page on disk. A page is one write, and a disk reaches its bandwidth with writes of this
    size."""

    page_head_bytes: int = 1 * KIB
    """The minimum bytes of one head's keys in a page on disk. They are contiguous in memory, and attention over
    shorter runs takes longer."""

    page_tokens: int = 128
    """The maximum tokens of a page on disk."""

    choice_bytes: int = 16 * KIB
    """The minimum bytes of values of one row and K/V head that sparse attention reads from disk at once. A disk reads
    single blocks at a small fraction of its bandwidth, so skipping blocks in between would save nothing."""

    choice_tokens: int = 128
    """The maximum tokens that are chosen together, unless whole disk blocks need more."""

    def tokens_on_disk(self, heads: int, head_bytes: int) -> int:
        """Tokens per page on disk, if a token has `heads` keys and values of `head_bytes` each."""
        wanted = max(-(-self.page_bytes // (heads * head_bytes)), -(-self.page_head_bytes // head_bytes))
        return min(wanted, self.page_tokens)

    def chosen_together(self, token_bytes: int) -> int:
        """Tokens that are read from disk together, if a token has `token_bytes` per head: whole disk blocks."""
        whole = BLOCK // math.gcd(BLOCK, token_bytes)
        wanted = -(-self.choice_bytes // (whole * token_bytes))
        return whole * max(min(wanted, self.choice_tokens // whole), 1)
