"""The benefit of a shared prefix: tokens/s of prompts that begin with the same ids, with and without sharing.

    python benchmarks/prefix.py
    python benchmarks/prefix.py --documents 4

The model has eight layers of the OPT-1.3B shape with random weights in float32, on the CPU, with everything in
memory. Prompts have --prefix ids in common and --own ids of their own. With sharing, --prompts prompts run. Without
sharing, every prompt takes the same time, so --apart prompts are enough; both report new tokens per second. As a
check, the result has the share of the first --apart prompts for which both make the same ids.

With --documents, each prompt has one of that number of documents of --document-len ids between the common ids and its
own. Prompts with the same document are mixed with the others.

With --predict, the result also has the predicted tokens/s of both cases. The machine is measured before and after the
runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
from record import compared, interleaved, save
from transformers import OPTConfig

from flexgen import OptLM, Policy
from flexgen.models import open_model
from flexgen.predict.hardware import Hardware
from flexgen.predict.prediction import predict
from flexgen.probe.measured import measured
from flexgen.workload import Workload

SHAPE = dict(hidden_size=2048, num_attention_heads=32, ffn_dim=8192, word_embed_proj_dim=2048)


def predicted(
    config: OPTConfig, policy: Policy, args: argparse.Namespace, machines: Sequence[Hardware]
) -> dict[str, list[float]]:
    """The predicted tokens/s of each case, from each measurement of the machine."""
    spec = open_model(config, "dummy")[0]
    prefix = args.prefix + (args.document_len if args.documents else 0)
    lengths, cuts = (prefix + args.own, args.gen_len), ((args.prefix,) if args.documents else ())
    jobs = {
        "shared": Workload(*lengths, args.prompts, prefix, cuts=cuts, groups=max(args.documents, 1)),
        "whole prompts": Workload(*lengths, args.apart),
    }
    return {
        name: [
            predict(spec, policy, machine, job, dtype="float32").report.throughput_tokens_s
            for machine in machines
        ]
        for name, job in jobs.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--layers", type=int, default=8)
    add("--prefix", type=int, default=400, help="ids that all prompts share")
    add("--own", type=int, default=32, help="other ids of each prompt")
    add("--documents", type=int, default=0, help="documents, of which each prompt has one")
    add("--document-len", type=int, default=200, help="ids of each document")
    add("--gen-len", type=int, default=8)
    add("--prompts", type=int, default=256)
    add("--apart", type=int, default=32, help="prompts of the run without sharing")
    add("--batch", type=int, default=64)
    add("--repeats", type=int, default=1)
    add("--predict", action="store_true", help="also predict each case")
    add("--no-save", action="store_true", help="print only")
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    ids = rng.integers(5, 50_000, size=(args.prompts, args.prefix + args.own))
    ids[:, : args.prefix] = ids[0, : args.prefix]
    if args.documents:
        documents = rng.integers(5, 50_000, size=(args.documents, args.document_len))
        chosen = documents[np.arange(args.prompts) % args.documents]
        ids = np.concatenate([ids[:, : args.prefix], chosen, ids[:, args.prefix :]], axis=1)
    config = OPTConfig(num_hidden_layers=args.layers, **SHAPE)
    policy = Policy(
        gpu_batch_size=args.batch,
        num_gpu_batches=-(-args.prompts // args.batch),
        weights={"cpu": 100},
        cache={"cpu": 100},
        activations={"cpu": 100},
    )
    kept: dict[bool, np.ndarray] = {}

    def run(share: bool, prompts: int) -> dict[str, float]:
        models = dict(weights="dummy", dtype="float32", device="cpu", progress=False)
        with OptLM(config, policy.replace(share_prefix=share), **models) as model:
            model.generate(ids[:2, -args.own :], 2, stop=())  # libraries load their kernels
            kept[share], report = model.generate(ids[:prompts], args.gen_len, stop=(), stats=True)
        assert report.prefix == args.prefix * share
        assert report.prefix_groups == (max(args.documents, 1) if share else 1)
        return {
            "prefill_s": report.prefill_s,
            "decode_s": report.decode_s,
            "tokens_s": report.throughput_tokens_s,
        }

    machines = [measured("cpu", again=True)] if args.predict else []
    cases = {"shared": lambda: run(True, args.prompts), "whole prompts": lambda: run(False, args.apart)}
    found = interleaved(cases, args.repeats)
    both = min(map(len, kept.values()))
    shared, whole = (found[name]["tokens_s"]["median"] for name in cases)
    equal = float((kept[True][:both] == kept[False][:both]).all(axis=1).mean())
    print(
        f"{shared:.1f} against {whole:.1f} tokens/s: {shared / whole:.1f} times; {equal:.0%} of the rows are equal"
    )
    speeds = {}
    if args.predict:
        machines.append(measured("cpu", again=True))
        speeds = predicted(config, policy, args, machines)
    figures = {
        "arguments": vars(args),
        "cases": found,
        "ratio": shared / whole,
        "equal_rows": equal,
        "predicted": {
            name: compared(name, some, found[name]["tokens_s"]["median"]) for name, some in speeds.items()
        },
    }
    if not args.no_save:
        save("prefix_tree" if args.documents else "prefix", figures)


if __name__ == "__main__":
    main()
