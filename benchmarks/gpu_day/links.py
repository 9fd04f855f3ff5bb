"""The speed of host memory and the link in bytes/s: pinning, releasing, copies from pinned and pageable memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

from gpu_day import arguments, write


def rate(nbytes: int, work: Callable[[], object], calls: int = 1) -> float:
    """Bytes/s of `calls` calls that process `nbytes` each."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(calls):
        work()
    torch.cuda.synchronize()
    return calls * nbytes / (time.perf_counter() - began)


def main() -> int:
    args = arguments(__doc__)
    sizes = (1, 4) if args.toy else (1, 16, 256, 4096)
    write(args.json, {f"{mib} MiB": rates(mib << 20) for mib in sizes})
    return 0


def rates(nbytes: int) -> dict[str, float]:
    """Bytes/s of each operation on a buffer of `nbytes`."""
    cuda = torch.cuda.cudart()
    host = torch.ones(nbytes, dtype=torch.uint8)
    there = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    calls = max(min((256 << 20) // nbytes, 64), 2)
    return {
        "pageable to device": rate(nbytes, lambda: there.copy_(host), calls),
        "device to pageable": rate(nbytes, lambda: host.copy_(there), calls),
        "pin": rate(nbytes, lambda: _checked(cuda.cudaHostRegister(host.data_ptr(), nbytes, 0))),
        "pinned to device": rate(nbytes, lambda: there.copy_(host, non_blocking=True), calls),
        "device to pinned": rate(nbytes, lambda: host.copy_(there, non_blocking=True), calls),
        "release": rate(nbytes, lambda: _checked(cuda.cudaHostUnregister(host.data_ptr()))),
    }


def _checked(status: object) -> None:
    if int(status) != 0:  # type: ignore[call-overload]
        raise RuntimeError(f"the CUDA runtime returned {status}")


if __name__ == "__main__":
    sys.exit(main())
