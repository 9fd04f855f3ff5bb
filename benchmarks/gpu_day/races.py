"""Policies with all tiers, attention devices and codecs with torch's stream sanitizer, which must find no races."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from gpu_day import arguments, write

sys.path.append(str(Path(__file__).parents[2] / "tests" / "fakecuda"))
from simulated import cases
from simulated.races import watched

KINDS = {
    "all tiers": {},
    "attention on the CPU": {"attend_on": "cpu"},
    "no overlap": {"overlap": False},
    "whole layers, not pinned": {"sep_layer": False, "pin_weight": False},
    "int4": {"weights": cases.encoded("int4"), "cache": cases.encoded("int4")},
    "int8": {"weights": cases.encoded("int8"), "cache": cases.encoded("int8")},
    "sparse": {"attn_sparsity": 0.5, "cache": {"gpu": 50, "cpu": 50}},
}


def main() -> int:
    args = arguments(__doc__)
    kinds = dict(list(KINDS.items())[: 2 if args.toy else None])
    found = {}
    for name, changes in kinds.items():
        model = cases.open_on("cuda", cases.OPT, cases.policy(**changes), "float16")
        with watched() as races, model:
            model.generate(cases.PROMPTS, 4 if args.toy else 24, stop=())
            model.generate(cases.PROMPTS, 6, stop=range(0, cases.VOCAB, 3))
            model.forward(cases.PROMPTS[:4])
            torch.cuda.synchronize()
        found[name] = {
            "operations": races.operations,
            "hazards": races.hazards.total(),
            "which": str(races) if races.hazards else "",
        }
        write(args.json, found)
    return int(any(kind["hazards"] for kind in found.values()))


if __name__ == "__main__":
    sys.exit(main())
