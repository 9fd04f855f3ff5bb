"""Compare the searched policy with policies written by hand: throughput of the same job on this machine.

    python benchmarks/searched.py --offload-dir DIR

Each setting has a model that does not fit in memory, one job, and twelve policies that an experienced user might
write, all without codecs. The machine is measured first (like `python -m flexgen.measure`), `find_policy` chooses a
policy from these figures, and all thirteen policies run the whole job, interleaved. Target: the searched policy has
at least 90% of the throughput of the best hand-made policy. DIR should be on a real disk; it needs a few GB.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from record import RESULTS, interleaved, load_results, save
from transformers import OPTConfig

from flexgen import OptLM, Policy, Tier
from flexgen.engine.auto import this_machine
from flexgen.models import open_model
from flexgen.predict.hardware import Hardware
from flexgen.predict.prediction import predict
from flexgen.probe.measured import measured
from flexgen.search.find import find_policy
from flexgen.units import MIB
from flexgen.workload import Workload

TARGET = 0.90
SEARCHED = "searched"
DTYPE = "bfloat16"
MODEL = OPTConfig(
    hidden_size=2048, ffn_dim=8192, num_hidden_layers=6, num_attention_heads=32, word_embed_proj_dim=2048,
    vocab_size=8192,  # OPT's own vocabulary would be a third of the bytes of these few layers, and of their buffers
)  # fmt: skip
JOB = Workload(prompt_len=16, gen_len=8, num_prompts=32)


class Run(NamedTuple):
    policy: Policy
    order: str | None = None


class Setting(NamedTuple):
    device: str
    max_memory: Mapping[Tier, int]
    hand_made: Mapping[str, Run]


def _host(batch: int, batches: int, cpu: int, **fields: Any) -> Run:
    """A policy with `cpu` percent of the weights in memory, the rest on disk, and all other data in memory."""
    given = {"weights": {"cpu": cpu, "disk": 100 - cpu}, "cache": {"cpu": 100}, "activations": {"cpu": 100}}
    return Run(Policy(gpu_batch_size=batch, num_gpu_batches=batches, **given | fields))


def _device(batch: int, batches: int, gpu: int, cpu: int, **fields: Any) -> Run:
    """A policy with weights by percent, the rest on disk, cache in host memory and hidden states on the device."""
    weights = {"gpu": gpu, "cpu": cpu, "disk": 100 - gpu - cpu}
    given = {"weights": weights, "cache": {"cpu": 100}, "activations": {"gpu": 100}}
    return Run(Policy(gpu_batch_size=batch, num_gpu_batches=batches, **given | fields))


ON_DISK, ON_DEVICE = {"disk": 100}, {"gpu": 100}
CPU = {
    "all weights on disk, 1 x 32": _host(32, 1, 0),
    "all weights on disk, 4 x 8": _host(8, 4, 0),
    "1 x 32": _host(32, 1, 35),
    "2 x 16": _host(16, 2, 40),
    "4 x 8": _host(8, 4, 45),
    "8 x 4": _host(4, 8, 45),
    "1 x 16": _host(16, 1, 45),
    "2 x 8": _host(8, 2, 50),
    "2 x 16, whole layers": _host(16, 2, 30, sep_layer=False),
    "2 x 16, cache on disk": _host(16, 2, 45, cache=ON_DISK),
    "1 x 32, normal": _host(32, 1, 45, overlap=False),
    "4 x 8, normal": _host(8, 4, 50, overlap=False),
}
WHOLE: dict[str, Any] = {"sep_layer": False}
KEPT: dict[str, Any] = {"cache": ON_DEVICE}
EMULATED = {
    "host attends, 4 x 8, whole layers": _device(8, 4, 0, 40, **WHOLE),
    "host attends, 4 x 8": _device(8, 4, 15, 50),
    "host attends, 2 x 16": _device(16, 2, 15, 50),
    "host attends, 1 x 32": _device(32, 1, 20, 50),
    "cache fetched, 4 x 8": _device(8, 4, 35, 50, attend_on="gpu"),
    "cache on device, 1 x 32": _device(32, 1, 15, 50, **KEPT),
    "cache on device, 2 x 16": _device(16, 2, 20, 50, **KEPT),
    "cache on device, 4 x 8": _device(8, 4, 20, 50, **KEPT),
    "cache on device, 1 x 16": _device(16, 1, 25, 50, **KEPT),
    "cache half and half, 2 x 16": _device(16, 2, 10, 40, cache={"gpu": 50, "cpu": 50}),
    "no weights on device, 2 x 16": _device(16, 2, 0, 60, **KEPT),
    "cache on device, 1 x 32, normal": _device(32, 1, 20, 60, overlap=False, **KEPT),
}
SETTINGS = {
    "cpu": Setting("cpu", {Tier.CPU: 420 * MIB}, CPU),
    # The device is measured with its full size; the limit is for policies only.
    "emulated": Setting(
        "emulated:memory=3GiB,link=2GiB,disk=1GiB", {Tier.GPU: 320 * MIB, Tier.CPU: 520 * MIB}, EMULATED
    ),
}


def foretell(hardware: Hardware, run: Run) -> dict[str, float]:
    """The prediction of a run."""
    spec, _ = open_model(MODEL, "dummy")
    report = predict(spec, run.policy, hardware, JOB, dtype=DTYPE, order=run.order).report
    return {"seconds": report.total_s, "prefill_s": report.prefill_s, "decode_s": report.decode_s}


def search(hardware: Hardware) -> Run:
    """The policy that the search finds without codecs."""
    spec, _ = open_model(MODEL, "dummy")
    found = find_policy(spec, hardware, JOB, dtype=DTYPE)
    print(
        f"searched in {found.seconds:.1f} s: {found.line()}", *found.best.limits, sep="\n  ", file=sys.stderr
    )
    return Run(found.best.policy, found.best.order)


def do_job(model: OptLM, prompts: np.ndarray) -> dict[str, float]:
    model.generate(prompts, JOB.gen_len, stop=())
    assert model.stats is not None
    timing = model.stats.timing
    return {"seconds": timing.total, "prefill_s": timing.prefill, "decode_s": timing.decode}


def measure(
    setting: Setting, runs: Mapping[str, Run], folder: str, repeats: int
) -> dict[str, dict[str, Any]]:
    """Measure all runs. All models are open at the same time, so that the repeats can be interleaved."""
    prompts = np.random.default_rng(0).integers(4, MODEL.vocab_size, size=(JOB.num_prompts, JOB.prompt_len))
    with contextlib.ExitStack() as stack:
        cases = {}
        for name, (policy, order) in runs.items():
            model = stack.enter_context(
                OptLM(
                    MODEL, policy, device=setting.device, dtype=DTYPE, weights="dummy", offload_dir=folder,
                    order=order, max_memory=setting.max_memory, progress=False,
                )
            )  # fmt: skip
            model.generate(prompts[:, :1], 2, stop=())  # creates threads and touches pages
            cases[name] = partial(do_job, model, prompts)
        return interleaved(cases, repeats)


def compare(setting: Setting, folder: str, repeats: int, again: bool) -> dict[str, Any]:
    """Run one setting: the search, all runs, and their predictions."""
    if again:
        measured(setting.device, folder, again=True)
    hardware = this_machine(setting.device, folder, max_memory=setting.max_memory)
    runs = {SEARCHED: search(hardware), **setting.hand_made}
    foretold = {
        name: foretell(hardware, run) for name, run in runs.items()
    }  # raises if a policy does not fit
    found = measure(setting, runs, folder, repeats)
    seconds = {name: figures["seconds"]["median"] for name, figures in found.items()}
    best = min(setting.hand_made, key=seconds.__getitem__)
    return {
        "device": setting.device,
        "max_memory": {str(tier): count for tier, count in setting.max_memory.items()},
        "share_of_best": seconds[best] / seconds[SEARCHED],
        "best_hand_made": best,
        "hardware": hardware.to_dict(),
        "figures": {
            name: {
                "policy": run.policy.to_dict(),
                "order": run.order,
                "tokens_s": JOB.num_prompts * JOB.gen_len / seconds[name],
                "predicted_tokens_s": JOB.num_prompts * JOB.gen_len / foretold[name]["seconds"],
                "measured": found[name],
                "predicted": foretold[name],
            }
            for name, run in runs.items()
        },
    }


def table(found: Mapping[str, Any]) -> str:
    """One line per policy, with the fastest first."""
    rows = [f"{'tokens/s':>10}{'predicted':>11}"]
    for name, one in sorted(found["figures"].items(), key=lambda item: -item[1]["tokens_s"]):
        rows.append(f"{one['tokens_s']:>10.2f}{one['predicted_tokens_s']:>11.2f}  {name}")
    rows.append(f"searched / best hand-made: {found['share_of_best']:.2f}, target {TARGET:.2f}")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--offload-dir", required=True)
    add("--repeats", type=int, default=3)
    add("--case", choices=SETTINGS, action="append", help="run only this setting (may be repeated)")
    add("--again", action="store_true", help="measure the machine again")
    add("--resume", action="store_true", help="keep the other settings in the results")
    args = parser.parse_args()
    path = RESULTS / "searched.json"
    before = load_results(path) if args.resume else {}
    settings: dict[str, Any] = before.get("settings", {})
    for name in args.case or SETTINGS:
        if name not in settings:
            settings[name] = compare(SETTINGS[name], args.offload_dir, args.repeats, args.again)
        document = {
            "model": "6 layers of the OPT-1.3B shape, vocabulary of 8192, random weights, " + DTYPE,
            "job": dataclasses.asdict(JOB),
            "target": TARGET,
            "settings": settings,
        }
        save("searched", document, path)
        print(f"{name}: {SETTINGS[name].device}", table(settings[name]), sep="\n", flush=True)
    print(path)


if __name__ == "__main__":
    main()
