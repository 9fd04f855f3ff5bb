"""How a model's files are downloaded from the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class HubOptions:
    """Options of a download. A model in a local directory does not use them.

    revision: a branch, a tag or a commit of the repository; None is its main branch.
    token: an access token, True for the one that is stored on this machine, False for none; None sends the stored
        one where there is one.
    cache_dir: the folder of downloaded files; None is the cache of huggingface_hub.
    local_files_only: use the cache only and send no request.
    """

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of huggingface_hub's downloads."""
        return {
            "revision": self.revision,
            "token": self.token,
            "cache_dir": self.cache_dir,
            "local_files_only": self.local_files_only,
        }
