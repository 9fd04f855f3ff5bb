"""The figures of the probe with small sizes, in seconds. `python -m flexgen.measure` returns the real figures."""

from __future__ import annotations

import sys
import tomllib

from flexgen.probe.effort import Effort, Sampling
from flexgen.probe.machine import measure
from flexgen.units import MIB
from gpu_day import arguments, write

TOY = Effort(
    hidden=256,
    heads=4,
    working_set=1,
    rows=(1, 8),
    prompt=16,
    context=64,
    cache_rows=2,
    file=1 * MIB,
    transfer=1 * MIB,
    layers=2,
    tokens=4,
    sampling=Sampling(repeats=3, seconds=0.0, together=0.05),
)


def main() -> int:
    args = arguments(__doc__)
    if not args.toy:
        sys.exit("--toy is missing; for the real figures, run python -m flexgen.measure --device cuda:0")
    write(args.json, tomllib.loads(measure("cuda:0", effort=TOY).to_toml()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
