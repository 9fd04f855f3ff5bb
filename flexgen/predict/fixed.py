"""Fixed times of a machine, which do not depend on bytes or flops."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """Seconds in addition to the time of bytes and flops.

    cell: for each cell that the code of a layer computes.
    attention: for each such cell with attention, in addition to `cell`.
    recorded: for each cell of the decode that a CPU repeats from a tape, instead of both. 0 if it repeats none.
    recording: in addition, for each cell whose tape is recorded in the present pass.
    joined: the same if one call repeats it after the cell of the previous layer.
    attend: for each batch and layer for which the host computes attention, in addition to its bytes.
    split: for each cell whose attention is a step of its own, on the compute device, instead of `cell` and
        `attention`. 0 if it takes as long.
    encoded: for each cell of the decode that encodes new keys and values, in addition.
    ids: for each batch whose new ids are stored; 0 if it takes as long as a `stage`.
    stage: for each stage of a transfer.
    disk_job: for each job of the disk.
    """

    cell: float = 0.0
    attention: float = 0.0
    recorded: float = 0.0
    recording: float = 0.0
    joined: float = 0.0
    attend: float = 0.0
    split: float = 0.0
    encoded: float = 0.0
    ids: float = 0.0
    stage: float = 0.0
    disk_job: float = 0.0
