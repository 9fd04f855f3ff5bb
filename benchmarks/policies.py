"""Search a policy for each model of FlexGen's paper on the paper's machine, and write it to `policies/`.

    python benchmarks/policies.py [--model opt-30b] [--machine t4]

The models are OPT-6.7B, OPT-30B and OPT-175B on `t4`, and on `t4-paper` with the constants of the paper (`-found`),
without codecs and with them (`-int4`), for 1,024 prompts of 512 tokens and 32 new tokens. Nothing is measured.
`benchmarks/paper_table.py` compares the results with the published figures.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from flexgen import Auto
from flexgen.engine.auto import own_order
from flexgen.models import open_model
from flexgen.predict.hardware import Hardware
from flexgen.predict.prediction import predict
from flexgen.search.find import find_policy
from flexgen.workload import Workload

POLICIES = Path(__file__).resolve().parents[1] / "policies"
MACHINES = {"t4": "", "t4-paper": "-found"}
"""The machines, and the ends of the names of their policies. `t4-paper` also has the policies of the paper."""
MODELS = "opt-6.7b", "opt-30b", "opt-175b"
WORKLOAD = Workload(prompt_len=512, gen_len=32, num_prompts=1024)  # the paper's largest block has 512


def write(model: str, name: str, lossy: bool) -> None:
    """Search, and save the best policy with its purpose and the command that predicts it."""
    spec, _ = open_model(model, "dummy")
    machine = Hardware.preset(name)
    best = find_policy(spec, machine, WORKLOAD, Auto({"attn_sparsity": 1.0}, lossy)).best
    path = POLICIES / f"{model}-{name}{MACHINES[name]}{'-int4' if lossy else ''}.toml"
    # The search samples tokens, so the comment contains the prediction of the command.
    speed = predict(spec, best.policy, machine, WORKLOAD, order=best.order).report.throughput_tokens_s
    order = "" if best.order == own_order(best.policy, machine) else f" --order {best.order}"
    job = f"--prompt-len {WORKLOAD.prompt_len} --gen-len {WORKLOAD.gen_len} --num-prompts {WORKLOAD.num_prompts}"
    comment = (
        f"{spec.name.upper()} on the machine {name!r} of flexgen/predict/hardware.toml, "
        f"{'with codecs' if lossy else 'without codecs'}: the best\n"
        f"policy that benchmarks/policies.py found for {WORKLOAD.num_prompts} prompts of {WORKLOAD.prompt_len} "
        f"tokens and {WORKLOAD.gen_len} new tokens each.\n"
        f"Predicted: {speed:.4g} tokens/s\n"
        f"python -m flexgen.simulate --model {model} --policy policies/{path.name} --hardware {name}{order} {job}"
    )
    best.policy.save(path, comment)
    print(f"{path}: {speed:.4g} tokens/s", *best.limits, sep="\n  ", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Search the policies of policies/ for the paper's machine.")
    parser.add_argument("--model", choices=MODELS, action="append", help="only this model (may be repeated)")
    parser.add_argument("--machine", choices=MACHINES, action="append", help="only this machine")
    args = parser.parse_args()
    for model, name, lossy in itertools.product(
        args.model or MODELS, args.machine or MACHINES, (False, True)
    ):
        write(model, name, lossy)


if __name__ == "__main__":
    main()
