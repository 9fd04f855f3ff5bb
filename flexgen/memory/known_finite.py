"""Remembers for the user which weights in files contain no NaN, so that they are checked once, not at every start."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable

from flexgen.models.checkpoint import Extent
from flexgen.user_cache import cache_folder, keep

logger = logging.getLogger(__name__)


class KnownFinite:
    """Whether the weights in `extents` are finite. Valid for one state of the files, their `identity`.

    Converted files need no record: they were checked before they were written.
    """

    def __init__(self, identity: str, extents: Iterable[Extent]) -> None:
        places = sorted(f"{extent.path} {extent.offset} {extent.nbytes} {extent.dtype}" for extent in extents)
        text = "\n".join([identity, *places])
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        self._record = cache_folder("finite_weights") / digest
        self.known = not places or self._record.exists()
        """Whether an earlier start checked all of them."""

    def keep(self) -> None:
        """Remember that all of them were found finite."""
        if self.known:
            return
        try:
            keep(self._record, b"")
        except OSError as error:
            logger.debug("cannot remember that the weights are finite: %s", error)
        self.known = True
