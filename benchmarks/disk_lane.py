"""Bandwidth of back-to-back reads through the disk lane: one at a time, and with the next one started ahead.

    python benchmarks/disk_lane.py --offload-dir DIR

Reads a scratch file in DIR, which should be on a real disk, completely with O_DIRECT, in jobs of 4 to 32 MiB, like
layers and pieces of layers. `plain` is the raw transfer in one call: the full bandwidth of the disk.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from functools import partial
from pathlib import Path

import torch
from record import interleaved, save

from flexgen.memory.cpu import HostStore
from flexgen.memory.disk import DiskIO, Read, ReadJob, Write
from flexgen.memory.disk_lane import DiskLane
from flexgen.memory.disk_store import DiskStore
from flexgen.memory.lanes import Lane, ThreadLane
from flexgen.results.trace import LaneName
from flexgen.schedule.steps import Op, Step
from flexgen.units import MIB

STEP = Step(Op.LOAD_WEIGHTS, 0, 0)


def in_jobs(lane: Lane, io: DiskIO, path: Path, buffer: torch.Tensor, nbytes: int) -> dict[str, float]:
    began = time.perf_counter()
    for start in range(0, buffer.nbytes - nbytes + 1, nbytes):
        done = lane.submit(ReadJob(io, [Read(path, start, buffer[start : start + nbytes])]), (), STEP)
    done.wait()
    return {"GB/s": buffer.nbytes // nbytes * nbytes / (time.perf_counter() - began) / 1e9}


def in_one_call(io: DiskIO, path: Path, buffer: torch.Tensor) -> dict[str, float]:
    began = time.perf_counter()
    io.read([Read(path, 0, buffer)])
    return {"GB/s": buffer.nbytes / (time.perf_counter() - began) / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--offload-dir", required=True, type=Path)
    parser.add_argument("--file-mib", type=int, default=768)
    parser.add_argument("--job-mib", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--in-flight", type=int, nargs="+", default=[2, 3], help="numbers of jobs in flight")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    figures = {}
    with contextlib.ExitStack() as stack:
        io = stack.enter_context(DiskIO())
        store = stack.enter_context(DiskStore(args.offload_dir, io))
        buffer = HostStore().allocate(args.file_mib * MIB, "a file").random_(0, 256)
        path = store.scratch("reads", buffer.nbytes)
        io.write([Write(path, 0, buffer)])
        lanes: dict[str, Lane] = {"one at a time": ThreadLane(LaneName.DISK_READ).start()}
        lanes |= {f"{n} in flight": DiskLane(LaneName.DISK_READ, n).start() for n in args.in_flight}
        for lane in lanes.values():
            stack.callback(lane.close)
        for size in args.job_mib:
            cases = {
                name: partial(in_jobs, lane, io, path, buffer, size * MIB) for name, lane in lanes.items()
            }
            cases["plain"] = partial(in_one_call, io, path, buffer)
            figures[f"{size} MiB"] = interleaved(cases, args.repeats)
    names = [*lanes, "plain"]
    print(f"{'GB/s, jobs of':<14}" + "".join(f"{name:>16}" for name in names))
    for size_name, found in figures.items():
        print(f"{size_name:<14}" + "".join(f"{found[name]['GB/s']['median']:>16.2f}" for name in names))
    print(save("disk_lane", {"file_bytes": args.file_mib * MIB, "figures": figures}))


if __name__ == "__main__":
    main()
