"""A cache of converted weights: files in the offload directory that are written once and reused by later runs.

The offload directory has a folder for each model. It contains a folder for each state of the checkpoint's files,
which contains the converted files. Each file has a record with a digest of its content.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from flexgen.errors import FlexGenError
from flexgen.memory.disk_store import DiskStore
from flexgen.models.checkpoint import Checkpoint
from flexgen.quant.codec import ENCODING

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"
_RECORD = ".json"
_NAME_LIMIT = 80  # characters; file systems take 255 bytes
_DIGITS = 16
_STATE = re.compile(f"[0-9a-f]{{{_DIGITS}}}")


class Conversions:
    """The converted files of one checkpoint.

    A file is reused if it has the expected header and its content has the recorded digest. The digest is computed
    again only if the size, times or inode of the file differ from the record: every write changes at least the ctime,
    which no program can set. (A write within the same tick of the file system's clock, some milliseconds after the
    file was made, is not detected.)

    While the store is open, no other process removes the files.
    """

    def __init__(self, disk: DiskStore, model: str, checkpoint: Checkpoint) -> None:
        """model: the name of the model, used to name its folder."""
        self._disk = disk
        self._model, self._state = _model_folder(model, checkpoint), _state_folder(checkpoint)
        self._found: dict[str, Path | None] = {}

    def find(self, name: str, header: bytes, nbytes: int) -> Path | None:
        """The file `name` that an earlier run wrote, or None if it is missing or damaged.

        header, nbytes: the first bytes that the file must have, and its size.
        """
        name = f"{self._model}/{self._state}/{name}"
        if name not in self._found:
            self._found[name] = self._verified(name, header, nbytes)
        return self._found[name]

    def write(self, name: str, nbytes: int, write: Callable[[BinaryIO], None]) -> Path:
        """Write the file `name` of `nbytes` bytes atomically. Raises the errors of `DiskStore.publish`."""
        self._disk.use(f"{self._model}/{self._state}", make=True)
        name, digest = f"{self._model}/{self._state}/{name}", ""

        def write_and_digest(file: BinaryIO) -> None:
            nonlocal digest
            write(file)
            file.flush()
            digest = _digest(file)

        path = self._disk.publish(name, write_and_digest, nbytes)
        self._record(name, path, digest)
        self._found[name] = path
        return path

    def remove_stale(self) -> None:
        """Remove files that were converted from an earlier state of the checkpoint's files.

        Files that another process uses stay; a later run removes them.
        """
        for path in self._disk.published_folders(self._model, _STATE):
            if path.name != self._state and self._disk.remove_unused(path):
                logger.info("removed %s: its checkpoint has changed since the conversion", path)

    def _verified(self, name: str, header: bytes, nbytes: int) -> Path | None:
        if not self._disk.use(f"{self._model}/{self._state}", make=False):
            return None
        path = self._disk.published(name)
        if path is None:
            return None
        try:
            with path.open("rb") as file:
                stamp = _stamp(file)
                if stamp["size"] != nbytes or file.read(len(header)) != header:
                    return None
                record = self._read_record(name)
                digest = record.get("sha256")
                if digest is None or record.get("stamp") != stamp and _digest(file) != digest:
                    logger.warning("%s does not have its recorded digest; it is written again", path)
                    return None
        except OSError:
            return None
        if record.get("stamp") != stamp:  # the file was copied, for example
            # Without a new record, the next run computes the digest again.
            with contextlib.suppress(FlexGenError):
                self._record(name, path, digest)
        return path

    def _record(self, name: str, path: Path, digest: str) -> None:
        with path.open("rb") as file:
            record = json.dumps({"sha256": digest, "stamp": _stamp(file)}).encode()

        def write(file: BinaryIO) -> None:
            file.write(record)

        self._disk.publish(name + _RECORD, write, len(record))

    def _read_record(self, name: str) -> dict[str, Any]:
        path = self._disk.published(name + _RECORD)
        try:
            record = json.loads(path.read_bytes()) if path else {}
        except (ValueError, RecursionError):
            return {}
        return record if isinstance(record, dict) else {}


def converted_bytes(model: str, checkpoint: Checkpoint, offload_dir: str | Path) -> int:
    """Bytes of the files that earlier runs converted from the current state of the checkpoint."""
    folder = Path(offload_dir, _model_folder(model, checkpoint), _state_folder(checkpoint))
    return sum(path.stat().st_size for path in folder.glob("*" + SUFFIX))


def _model_folder(model: str, checkpoint: Checkpoint) -> str:
    """A readable folder name: the end of the model's name, never "..". The digits distinguish models of one name."""
    readable = re.sub(r"[^A-Za-z0-9_.-]+", "--", model)[-_NAME_LIMIT:].strip(".-") or "model"
    return f"{readable}-{_short(chr(0).join(map(str, checkpoint.sources)))}"


def _state_folder(checkpoint: Checkpoint) -> str:
    """The folder for the present state of the checkpoint and the codecs. The other folders of the model are stale."""
    return _short(f"{checkpoint.identity} encoding {ENCODING}")


def _short(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:_DIGITS]


def _digest(file: BinaryIO) -> str:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def _stamp(file: BinaryIO) -> dict[str, int]:
    status = os.fstat(file.fileno())
    return {
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
        "inode": status.st_ino,
    }
