"""Attention over a prefix that all rows share, against attention over a copy of the prefix in the cache of each row.

    python benchmarks/prefix_attention.py

The decode has one new token of each row, and the prefill some own tokens of each row, over the prefix and over
themselves. The seconds are those of one layer, without its products. "copies" is what runs without a shared prefix:
decode attention over the whole cache of each row, and torch's fused attention over all tokens.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from record import interleaved, save
from torch import Tensor

from flexgen.kernels.attention import decode_attention
from flexgen.kernels.loading import native, native_available
from flexgen.kernels.partial import merge
from flexgen.kernels.scoring import Scoring
from flexgen.kernels.shared_prefix import attend_prefix, prefix_in_torch
from flexgen.models.ops import causal_attention, causal_part

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HEADS = 32
LEAST_SECONDS = 0.1
"""The minimum time of a measurement."""


def seconds(call: Callable[[], object]) -> dict[str, float]:
    """The seconds of a call, from enough calls for `LEAST_SECONDS`."""
    began, calls = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < LEAST_SECONDS:
        call()
        calls += 1
    return {"s": passed / calls}


def copied(prefix: Tensor, rows: int) -> Tensor:
    """The prefix (kv_heads, tokens, head_dim), once for each row."""
    return prefix.expand(rows, *prefix.shape).contiguous()


def decode(args: argparse.Namespace, dtype: torch.dtype, kv_heads: int, dim: int) -> dict[str, Any]:
    q = torch.randn(args.rows, HEADS, 1, dim).to(dtype)
    k, v = torch.randn(2, kv_heads, args.prefix, dim).to(dtype)
    page, scoring = (copied(k, args.rows), copied(v, args.rows)), Scoring(dim**-0.5)
    return {
        "shared": partial(attend_prefix, q, k, v, scoring),
        "shared, torch": partial(prefix_in_torch, q, k, v, scoring),
        "copies": partial(decode_attention, q, [page], args.prefix, None, scoring),
    }


def prefill(args: argparse.Namespace, dtype: torch.dtype, kv_heads: int, dim: int) -> dict[str, Any]:
    q = torch.randn(args.rows, HEADS, args.own, dim).to(dtype)
    k, v = torch.randn(2, kv_heads, args.prefill_prefix, dim).to(dtype)
    own = torch.randn(2, args.rows, kv_heads, args.own, dim).to(dtype)
    copies = [torch.cat((copied(x, args.rows), mine), dim=2) for x, mine in zip((k, v), own, strict=True)]
    scoring = Scoring(dim**-0.5)

    def parts(attend: Callable[..., Any]) -> Tensor:
        return merge([attend(q, k, v, scoring), causal_part(q, own[0], own[1], None, scoring)], dtype)

    return {
        "shared": partial(parts, attend_prefix),
        "shared, torch": partial(parts, prefix_in_torch),
        "copies": partial(causal_attention, q, *copies, None, scoring),
    }


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for what, name, kv_heads, dim in itertools.product((decode, prefill), args.dtypes, (8, 32), (64, 128)):
        cases = what(args, DTYPES[name], kv_heads, dim)
        figures = interleaved({case: partial(seconds, call) for case, call in cases.items()}, args.repeats)
        medians = {case: figures[case]["s"]["median"] for case in cases}
        yield {
            **{"pass": what.__name__, "dtype": name, "kv_heads": kv_heads, "head_dim": dim},
            **medians,
            "copies / shared": medians["copies"] / medians["shared"],
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument(
        "--prefix", type=int, default=1024, help="shared tokens in the decode (default: 1024)"
    )
    parser.add_argument(
        "--prefill-prefix", type=int, default=400, help="shared tokens in the prefill (default: 400)"
    )
    parser.add_argument("--own", type=int, default=32, help="own tokens in the prefill (default: 32)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not native_available():
        parser.error("the compiled kernels are not built or are disabled")
    torch.manual_seed(0)
    shape = {name: getattr(args, name) for name in ("rows", "prefix", "prefill_prefix", "own")}
    about = {"unit": "seconds, median", "variant": native.variant(), "shape": {"heads": HEADS} | shape}
    rows = []
    with torch.inference_mode():
        for row in measure(args):
            rows.append(row)
            path = save("prefix_attention", about | {"repeats": args.repeats, "figures": rows}, args.out)
            print(
                "  ".join(
                    f"{key} {value:.4g}" if isinstance(value, float) else str(value)
                    for key, value in row.items()
                )
            )
    print(path)


if __name__ == "__main__":
    main()
