"""The speed of products on a CPU by dtype and rows: the library's product with a plain weight ("plain") and with one
in oneDNN's layout ("packed"), and the product that flexgen takes for a plain weight ("linear").

    python benchmarks/host_linear.py

These figures are the reason for `fast_dtype` (no float16 on a CPU) and for the rows of `half_linear`.
"""

from __future__ import annotations

import argparse
import itertools
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from record import interleaved, save
from torch import Tensor

from flexgen.kernels.linear import linear, prelayout

OUT, IN = 4096, 4096
ROWS = (1, 8, 16, 32, 128, 512)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COPIES = 4  # weights in rotation, so that none stays in a processor cache


def rate(multiply: partial[Tensor], weights: list[Tensor], x: Tensor) -> dict[str, float]:
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < 0.2 or count < COPIES:
        multiply(x, weights[count % COPIES])
        count += 1
    return {"GFLOP/s": 2 * x.numel() * OUT * count / (time.perf_counter() - began) / 1e9}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the results to this file")
    args = parser.parse_args()
    cases = {}
    for dtype in DTYPES:
        plain = [torch.randn(OUT, IN).to(dtype) for _ in range(COPIES)]
        layouts = {"plain": plain, "linear": plain}
        if dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            layouts["packed"] = [prelayout(w) for w in plain]
        for rows, (layout, weights) in itertools.product(ROWS, layouts.items()):
            x = torch.randn(rows, IN).to(dtype)
            multiply = partial(F.linear if layout == "plain" else linear)
            cases[f"{str(dtype).removeprefix('torch.')} {layout}, {rows} rows"] = partial(
                rate, multiply, weights, x
            )
    found = interleaved(cases, args.repeats)
    for name, figures in found.items():
        print(f"{name:<32}{figures['GFLOP/s']['median']:>8.0f} GFLOP/s")
    print(save("host_linear", {"shape": [OUT, IN], "figures": found}, args.out))


if __name__ == "__main__":
    main()
