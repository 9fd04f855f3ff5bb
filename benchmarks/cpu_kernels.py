"""The speed of the CPU kernels: decode attention as a share of the memory bandwidth, and codecs in GB/s.

    python benchmarks/cpu_kernels.py

Attention is measured in bytes of valid keys and values, dequantisation in bytes of output. The read bandwidth is
measured between the cases, over the same memory with the same number of threads: the better one of a plain compiled
loop and torch.sum. The torch versions are measured interleaved with the compiled ones. Encoded caches are measured in
their own bytes, and in tokens/s relative to a bfloat16 cache of the same size.

Attention of prompts is measured in GFLOP/s of the scores and sums that causal attention needs, and compared with
torch's fused attention of the same queries over copies of the keys and values for all heads.

Sparse attention is compared with exact attention over the same cache. The bytes alone would give a speedup of
2 / (1 + share).
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from record import RESULTS, interleaved, load_results, machine, save
from torch import Tensor

from flexgen.kernels import groupwise, sparse_attention
from flexgen.kernels.attention import attend_in_torch, decode_attention
from flexgen.kernels.groupwise import quantise
from flexgen.kernels.heads import HeadFormat
from flexgen.kernels.loading import native, native_available
from flexgen.kernels.scoring import Scoring
from flexgen.models.ops import causal_attention
from flexgen.quant import CODECS, head_format

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CACHE_BYTES = 256 << 20  # keys and values of one case, far more than the processor caches
KV_HEADS = 8
LEAST_SECONDS = 0.1
"""The minimum time of a measurement. A call takes 20 ms, so a short interruption would dominate a single call."""
SHARES = (0.1, 0.25, 0.5)
PARTS = ("attention", "encoded_attention", "prompts", "sparse", "codecs")
PROMPTS = ((1, 128), (8, 128), (1, 2048), (1, 8192))
"""Rows and tokens."""
LAYOUTS = {
    # length, capacity, share of left padding in every second row
    "512": (512, 512, 0.0),
    "512 of 768": (512, 768, 0.0),
    "2048": (2048, 2048, 0.0),
    "2048 of 2560": (2048, 2560, 0.0),
    "2048 padded": (2048, 2048, 0.25),
}


Arguments = tuple[Tensor, list[tuple[Tensor, Tensor]], int, Tensor | None, Scoring, HeadFormat]


class Case(NamedTuple):
    nbytes: int
    arguments: Arguments


def case(memory: Tensor, codec: str, dtype: torch.dtype, group: int, dim: int, layout: str) -> Case:
    """A KV cache in one page that fills `memory`, with heads of this codec, type and size."""
    length, capacity, padding = LAYOUTS[layout]
    form = head_format(codec, dim, dtype)
    row_bytes = KV_HEADS * capacity * form.nbytes
    rows = memory.nbytes // (2 * row_bytes)
    both = memory[: 2 * rows * row_bytes].view(form.dtype).view(2, rows, KV_HEADS, capacity, form.width)
    starts = torch.arange(rows) % 2 * int(length * padding) if padding else None
    tokens = rows * length - (int(starts.sum()) if starts is not None else 0)
    q = torch.randn(rows, KV_HEADS * group, 1, dim).to(dtype)
    nbytes = 2 * tokens * KV_HEADS * form.nbytes
    return Case(nbytes, (q, [(both[0], both[1])], length, starts, Scoring(dim**-0.5), form))


def rate(nbytes: int, call: Callable[[], object]) -> dict[str, float]:
    """GB/s, from enough calls for `LEAST_SECONDS`."""
    began, calls = time.perf_counter(), 0
    while (seconds := time.perf_counter() - began) < LEAST_SECONDS:
        call()
        calls += 1
    return {"GB/s": calls * nbytes / seconds / 1e9}


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
        cases = {layout: case(memory[name], "none", DTYPES[name], group, dim, layout) for layout in LAYOUTS}
        calls = read_cases(memory[name])
        for layout, (nbytes, arguments) in cases.items():
            calls[f"{layout}, compiled"] = partial(rate, nbytes, partial(decode_attention, *arguments))
            calls[f"{layout}, torch"] = partial(rate, nbytes, partial(attend_in_torch, *arguments))
        figures = interleaved(calls, repeats)
        read = max(median(figures["read, compiled"]), median(figures["read, torch.sum"]))
        for layout in LAYOUTS:
            compiled, plain = (median(figures[f"{layout}, {version}"]) for version in ("compiled", "torch"))
            yield {
                **{"cache": name, "group": group, "head_dim": dim, "tokens": layout},
                **{"compiled": compiled, "torch": plain, "read": read, "share": compiled / read},
            }


def encoded_heads(form: HeadFormat) -> Tensor:
    """Encoded heads with `CACHE_BYTES` bytes."""
    some = form.encode(torch.randn(1, 1, 4096, form.head_dim)).flatten()
    return some.repeat(-(-CACHE_BYTES // some.nbytes))[: CACHE_BYTES // 1024 * 1024]


def encoded_attention(plain: Tensor, repeats: int) -> Iterator[dict[str, Any]]:
    bf16 = DTYPES["bf16"]
    for codec, dim in itertools.product(CODECS, (64, 80, 128)):
        form = head_format(codec, dim, bf16)
        memory, times = encoded_heads(form), dim * bf16.itemsize / form.nbytes
        for group in (1, 4, 8):
            calls = read_cases(memory)
            for layout in LAYOUTS:
                for name, heads, of in ((codec, memory, codec), ("bf16", plain, "none")):
                    nbytes, arguments = case(heads, of, bf16, group, dim, layout)
                    calls[f"{layout}, {name}"] = partial(rate, nbytes, partial(decode_attention, *arguments))
            figures = interleaved(calls, repeats)
            read = max(median(figures["read, compiled"]), median(figures["read, torch.sum"]))
            for layout in LAYOUTS:
                compiled, plainly = (median(figures[f"{layout}, {name}"]) for name in (codec, "bf16"))
                yield {
                    **{"cache": codec, "group": group, "head_dim": dim, "tokens": layout},
                    **{"compiled": compiled, "read": read, "share": compiled / read},
                    "tokens/s over bf16": times * compiled / plainly,
                }


def prompts(repeats: int) -> Iterator[dict[str, Any]]:
    heads = 4 * KV_HEADS
    for name, dim, (rows, tokens) in itertools.product(DTYPES, (64, 128), PROMPTS):
        q, k, v = (
            torch.randn(rows, tokens, count, dim).to(DTYPES[name]).transpose(1, 2)
            for count in (heads, KV_HEADS, KV_HEADS)
        )
        copies = [x.contiguous() for x in (q, *(x.repeat_interleave(4, dim=1) for x in (k, v)))]
        flops = 4 * rows * heads * dim * tokens * (tokens + 1) // 2
        calls = {
            "compiled": partial(causal_attention, q, k, v, None, Scoring(dim**-0.5)),
            "torch": partial(F.scaled_dot_product_attention, *copies, is_causal=True),
        }
        figures = interleaved(
            {version: partial(rate, flops, call) for version, call in calls.items()}, repeats
        )
        compiled, plain = (median(figures[version]) for version in calls)
        yield {
            **{"type": name, "head_dim": dim, "prompts": f"{rows} x {tokens}"},
            **{"compiled": compiled, "torch": plain, "ratio": compiled / plain},
        }


def attend_sparsely(version: str, share: float, arguments: Arguments) -> Tensor:
    """Both halves of sparse attention, in one version."""
    choose, attend_chosen = (
        getattr(sparse_attention, f"{half}_{version}") for half in ("choose", "attend_chosen")
    )
    *exact, _ = arguments  # the cache of sparse attention is not encoded
    return attend_chosen(choose(*exact, sparse_attention.Sparsity(share)), arguments[1])


def sparse(memory: dict[str, Tensor], repeats: int) -> Iterator[dict[str, Any]]:
    for name, group, layout in itertools.product(DTYPES, (1, 8), ("512", "2048")):
        dim = 128
        nbytes, arguments = case(memory[name], "none", DTYPES[name], group, dim, layout)
        calls = {"exact": partial(rate, nbytes, partial(decode_attention, *arguments))}
        for share, version in itertools.product(SHARES, ("natively", "in_torch")):
            call = partial(attend_sparsely, version, share, arguments)
            calls[f"{share}, {version}"] = partial(rate, nbytes, call)
        figures = interleaved(calls, repeats)
        exact = median(figures["exact"])
        for share in SHARES:
            compiled, plain = (median(figures[f"{share}, {v}"]) for v in ("natively", "in_torch"))
            yield {
                **{
                    "cache": name,
                    "group": group,
                    "head_dim": dim,
                    "tokens": layout,
                    "cache share": str(share),
                },
                **{"compiled": compiled / exact, "torch": plain / exact, "by bytes": 2 / (1 + share)},
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
        if key == "ratio":
            return f"{value:.2f}"
        return f"{value:.1f}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    lines += ["| " + " | ".join(cell(key, value) for key, value in row.items()) + " |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=PARTS, action="append", help="run only this part (may be repeated)")
    parser.add_argument(
        "--out",
        type=Path,
        help="write the results to this file; it keeps the parts that were measured before on this machine",
    )
    args = parser.parse_args()
    if not native_available():
        parser.error("the compiled kernels are not built or are disabled")
    load = os.getloadavg()[0]  # the load of other programs: the figures are valid only on an idle machine
    torch.manual_seed(0)
    memory = {
        name: torch.randn(CACHE_BYTES // dtype.itemsize).to(dtype).view(torch.uint8)
        for name, dtype in DTYPES.items()
    }
    parts: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "attention": partial(attention, memory, args.repeats),
        "encoded_attention": partial(encoded_attention, memory["bf16"], args.repeats),
        "prompts": partial(prompts, args.repeats),
        "sparse": partial(sparse, memory, args.repeats),
        "codecs": partial(codecs, args.repeats),
    }
    path = args.out or RESULTS / "cpu_kernels.json"
    earlier = load_results(path)
    same_machine = earlier.get("machine") == machine()
    figures: dict[str, Any] = {part: earlier[part] for part in PARTS if same_machine and part in earlier}
    repeats = {part: earlier["repeats"][part] for part in figures}
    about = {
        "unit": "GB/s, median",
        "repeats": repeats,
        "variant": native.variant(),
        "load_at_start": load,
    }
    for part in args.only or PARTS:
        figures[part], repeats[part] = list(parts[part]()), args.repeats
        print(table(figures[part]), save("cpu_kernels", about | figures, path), "", sep="\n\n")


if __name__ == "__main__":
    main()
