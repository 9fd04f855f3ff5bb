"""Run a Python command on a simulated GPU: `python tests/fakecuda/run.py -m pytest tests/fakecuda`.

Builds the simulated CUDA runtime for the CUDA build of torch in this environment, and starts the same interpreter
with it. Settings are environment variables (see cpp/machine.h): FAKECUDA_CC=75 FAKECUDA_GIB=16 gives one T4. The
default is a GPU of each of the compute capabilities 9.0, 7.5, 8.0 and 8.9, in this order.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
CPP = HERE / "cpp"
BUILD = HERE.parents[1] / "build" / "fakecuda"
RUNTIME, DRIVER = BUILD / "libfakecuda.so", BUILD / "driver" / "libcuda.so.1"
_DRIVER_SOURCE = CPP / "driver.cpp"


def cuda_headers() -> Path:
    """The folder of cuda_runtime_api.h, which torch's CUDA build brings. Raises SystemExit without it."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        if found := sorted(Path(folder).glob("cu*/include/cuda_runtime_api.h")):
            return found[-1].parent
    raise SystemExit("the simulated GPU needs the CUDA build of torch, as `make test-cuda` installs it")


def build() -> None:
    """Compile the runtime and the driver, where a source is newer."""
    sources = sorted(set(CPP.glob("*.cpp")) - {_DRIVER_SOURCE})
    exports = CPP / "exports.map"
    flags = ["g++", "-O1", "-shared", "-fPIC", "-std=c++17", "-Wall", "-Wextra"]
    includes = [f"-I{CPP}", f"-I{cuda_headers()}", f"-Wl,--version-script={exports}"]
    _compile(RUNTIME, [*sources, *CPP.glob("*.h"), exports], [*flags, *includes, *map(str, sources)])
    _compile(DRIVER, [_DRIVER_SOURCE], [*flags, str(_DRIVER_SOURCE)])


def _compile(target: Path, needed: list[Path], command: list[str]) -> None:
    if target.exists() and target.stat().st_mtime > max(path.stat().st_mtime for path in needed):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    made = target.with_suffix(f".{os.getpid()}")
    subprocess.run([*command, "-o", str(made)], check=True)
    made.replace(target)


def environment() -> dict[str, str]:
    """The environment of a process on the simulated GPU."""
    paths = [str(HERE), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "LD_PRELOAD": str(RUNTIME),
        "LD_LIBRARY_PATH": str(DRIVER.parent),
        # torch would compile a Triton kernel for products with an inner size of 1: the driver does not load kernels.
        "TORCH_DISABLE_NATIVE_JIT": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }


def main() -> None:
    build()
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], environment())


if __name__ == "__main__":
    main()
