"""The CPU kernels against the memory: decode attention as a share of the read bandwidth, and codecs in GB/s.

    python benchmarks/cpu_kernels.py

Attention is counted in bytes of valid keys and values, dequantisation in bytes of output. The read bandwidth
is measured between the cases, over the same memory with as many threads: the better of a plain compiled loop
and torch.sum. The versions in torch are measured beside the compiled ones.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from record import interleaved, save
from torch import Tensor

from flexgen.kernels import groupwise
from flexgen.kernels.attention import attend_in_torch, attend_natively
from flexgen.kernels.groupwise import quantise
from flexgen.kernels.loading import native, native_available

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CACHE_BYTES = 256 << 20  # keys and values of one case, far more than a cache holds
KV_HEADS = 8
LAYOUTS = {
    # length, capacity, share of left padding in every second row
    "512": (512, 512, 0.0),
    "512 of 768": (512, 768, 0.0),
    "2048": (2048, 2048, 0.0),
    "2048 of 2560": (2048, 2560, 0.0),
    "2048 padded": (2048, 2048, 0.25),
}


class Case(NamedTuple):
    nbytes: int
    arguments: tuple[Tensor, list[tuple[Tensor, Tensor]], int, Tensor | None, float]


def case(memory: Tensor, dtype: torch.dtype, group: int, dim: int, layout: str) -> Case:
    """A cache in one page that fills `memory`."""
    length, capacity, padding = LAYOUTS[layout]
    row_bytes = KV_HEADS * capacity * dim * dtype.itemsize
    rows = memory.nbytes // (2 * row_bytes)
    both = memory[: 2 * rows * row_bytes].view(dtype).view(2, rows, KV_HEADS, capacity, dim)
    starts = torch.arange(rows) % 2 * int(length * padding) if padding else None
    tokens = rows * length - (int(starts.sum()) if starts is not None else 0)
    q = torch.randn(rows, KV_HEADS * group, 1, dim).to(dtype)
    nbytes = 2 * tokens * KV_HEADS * dim * dtype.itemsize
    return Case(nbytes, (q, [(both[0], both[1])], length, starts, dim**-0.5))


def rate(nbytes: int, call: Callable[[], object]) -> dict[str, float]:
    began = time.perf_counter()
    call()
    return {"GB/s": nbytes / (time.perf_counter() - began) / 1e9}


def read_cases(memory: Tensor) -> dict[str, Callable[[], dict[str, float]]]:
    threads, floats = torch.get_num_threads(), memory.view(torch.float32)
    return {
        "read, compiled": partial(
            rate, memory.nbytes, partial(native.read, memory.data_ptr(), memory.nbytes, threads)
        ),
        "read, torch.sum": partial(rate, memory.nbytes, floats.sum),
    }


def median(figures: dict[str, Any]) -> float:
    return figures["GB/s"]["median"]


def attention(memory: dict[str, Tensor], repeats: int) -> Iterator[dict[str, Any]]:
    for name, group, dim in itertools.product(DTYPES, (1, 4, 8), (64, 80, 128)):
        cases = {layout: case(memory[name], DTYPES[name], group, dim, layout) for layout in LAYOUTS}
        calls = read_cases(memory[name])
        for layout, (nbytes, arguments) in cases.items():
            calls[f"{layout}, compiled"] = partial(rate, nbytes, partial(attend_natively, *arguments))
            calls[f"{layout}, torch"] = partial(rate, nbytes, partial(attend_in_torch, *arguments))
        figures = interleaved(calls, repeats)
        read = max(median(figures["read, compiled"]), median(figures["read, torch.sum"]))
        for layout in LAYOUTS:
            compiled, plain = (median(figures[f"{layout}, {version}"]) for version in ("compiled", "torch"))
            yield {
                **{"cache": name, "group": group, "head_dim": dim, "tokens": layout},
                **{"compiled": compiled, "torch": plain, "read": read, "share": compiled / read},
            }


def codecs(repeats: int) -> Iterator[dict[str, Any]]:
    x = torch.randn(4096, 8192).mul_(0.02).to(torch.bfloat16)
    out = torch.empty_like(x)
    for bits in (4, 8):
        packed = quantise(x, bits)
        figures = interleaved(
            {
                f"{what} int{bits}, {version}": partial(rate, x.nbytes, call)
                for what, version, call in (
                    ("dequantise", "compiled", partial(groupwise.dequantise_natively, packed, out)),
                    ("dequantise", "torch", partial(groupwise.dequantise_in_torch, packed, out)),
                    ("quantise", "compiled", partial(groupwise.quantise_natively, x, packed)),
                    ("quantise", "torch", partial(groupwise.quantise_in_torch, x, packed)),
                )
            },
            repeats,
        )
        for what in ("dequantise", "quantise"):
            compiled, plain = (
                median(figures[f"{what} int{bits}, {version}"]) for version in ("compiled", "torch")
            )
            yield {"codec": f"int{bits}", "what": what, "compiled": compiled, "torch": plain}


def table(rows: list[dict[str, Any]]) -> str:
    def cell(key: str, value: Any) -> str:
        if key == "share":
            return f"{value:.0%}"
        return f"{value:.1f}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    lines += ["| " + " | ".join(cell(key, value) for key, value in row.items()) + " |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if not native_available():
        parser.error("the compiled kernels are not built, or switched off")
    load = os.getloadavg()[0]  # of other work: what is measured is only right on a quiet machine
    torch.manual_seed(0)
    memory = {
        name: torch.randn(CACHE_BYTES // dtype.itemsize).to(dtype).view(torch.uint8)
        for name, dtype in DTYPES.items()
    }
    attended = list(attention(memory, args.repeats))
    packed = list(codecs(args.repeats))
    figures = {"variant": native.variant(), "load_at_start": load, "attention": attended, "codecs": packed}
    save("kernels", {"unit": "GB/s, median", "repeats": args.repeats, **figures})
    print(table(attended), table(packed), sep="\n\n")


if __name__ == "__main__":
    main()
