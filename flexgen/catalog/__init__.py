"""`flexgen models`, or `python -m flexgen.catalog`: the families and known sizes of models, and where they fit.

    flexgen models
    flexgen models qwen3-30b-a3b gpt-oss-120b --hardware rtx-4090 --prompt-len 512 --gen-len 128

Lists families with the features of their layers, and known sizes with their bytes. With `--hardware`, it searches for
a policy for each size, and prints its predicted tokens per second. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from flexgen.cli.flags import OutputFile, count, run
from flexgen.cli.help import HelpFormatter
from flexgen.engine.auto import USUAL
from flexgen.errors import CapacityError, FlexGenError, ModelError, did_you_mean, shown
from flexgen.layout.placement import place_weights
from flexgen.models import ModelSpec, WeightSpec, build_layers, open_model
from flexgen.models.families import about, config_from_dict, known_families, spec_from_config
from flexgen.models.known import known_name, known_names, known_repository, published_format
from flexgen.models.mlp_spec import MixtureSpec
from flexgen.models.published import published_bytes
from flexgen.models.spec import LayerSpec
from flexgen.policy import Auto, Policy, Split, Tier
from flexgen.predict.hardware import Hardware
from flexgen.predict.job import Job
from flexgen.probe.measured import find_hardware
from flexgen.search.effort import SURVEY
from flexgen.search.find import find_for_job
from flexgen.workload import Workload

_CODECS = ("int8", "int4")
"""The codecs whose bytes are listed."""
_SEARCHES_EACH = 8
"""The least number of searches for a process: its start takes as long as a few."""


@dataclass(frozen=True)
class FamilyEntry:
    """A family: its name, what it is, the features of its layers, and the names of its known sizes."""

    name: str
    about: str
    features: tuple[str, ...]
    sizes: tuple[str, ...]


@dataclass(frozen=True)
class Fit:
    """A known size on a machine.

    fits: whether a policy fits; None if that is unknown. tokens_s: predicted new tokens per second. policy: the
    placement in words. reason: why there is no prediction; None if there is one.
    """

    hardware: str
    fits: bool | None
    tokens_s: float | None = None
    policy: str | None = None
    bound_by: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class SizeEntry:
    """A known size. nbytes: bytes of the weights by format: "bfloat16", the codecs, and "published"."""

    name: str
    repository: str
    family: str
    parameters: int
    nbytes: dict[str, int]
    published: str
    fit: Fit | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    return run(make_parser(), catalog, argv)


def catalog(args: argparse.Namespace) -> None:
    """Print the families and sizes that the arguments ask for."""
    names = [_known(name) for name in args.names] or list(known_names())
    hardware = find_hardware(args.hardware) if args.hardware else None
    workload = Workload(args.prompt_len, args.gen_len, args.num_prompts)
    families = [] if args.names else family_entries()
    entries = size_entries(names, hardware, workload, args.lossy)
    # Sizes without predictions take no time, and need no bar.
    bar = tqdm(entries, "search", len(names), unit="model", disable=None if hardware else True, leave=False)
    sizes = list(bar)
    found: dict[str, Any] = {
        "families": [asdict(one) for one in families],
        "models": [asdict(one) for one in sizes],
    }
    if hardware:
        found |= {"hardware": hardware.name, "workload": asdict(workload)}
    if args.json != "-":
        table = _markdown if args.markdown else _aligned
        tables = [_families_table(families)] if families else []
        print("\n\n".join(map(table, [*tables, _sizes_table(sizes)])))
    if args.json:
        args.json.append(json.dumps(found))


def family_entries() -> list[FamilyEntry]:
    """All families, in the order of their names."""
    specs: dict[str, list[ModelSpec]] = {name: [] for name in known_families()}
    for name in known_names():
        spec, _ = open_model(name, "dummy")
        specs[spec.family].append(spec)
    return [
        FamilyEntry(name, about(name), _features(sizes or _default(name)), tuple(spec.name for spec in sizes))
        for name, sizes in specs.items()
    ]


def size_entries(
    names: Sequence[str], hardware: Hardware | None = None, workload: Workload = USUAL, lossy: bool = False
) -> Iterator[SizeEntry]:
    """The entries of known sizes, in this order, with predictions if `hardware` is given. lossy: as in `fit`.

    Many searches run in several processes, because a search is computed by Python code.
    """
    figures = hardware.to_dict() if hardware else None  # unlike the object, they can be sent to a process
    entry = partial(_named_entry, figures=figures, workload=workload, lossy=lossy)
    processes = min(len(os.sched_getaffinity(0)), len(names) // _SEARCHES_EACH) if hardware else 1
    if processes < 2:
        yield from map(entry, names)
        return
    # A plain fork could copy a lock that another thread of this process holds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["flexgen.catalog"])
    with ProcessPoolExecutor(processes, context, _ignore_interrupts) as pool:
        yield from pool.map(entry, names)


def _ignore_interrupts() -> None:
    """Leave Ctrl-C to the process that waits for the results."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _named_entry(name: str, figures: dict[str, Any] | None, workload: Workload, lossy: bool) -> SizeEntry:
    spec, _ = open_model(name, "dummy")
    return size_entry(spec, fit(spec, Hardware.from_dict(figures), workload, lossy) if figures else None)


def size_entry(spec: ModelSpec, fit: Fit | None = None) -> SizeEntry:
    """The entry of a known size, whose name is that of the spec."""
    form, counts = published_format(spec.name), Counter(spec.layers)
    layers = build_layers(replace(spec, layers=tuple(counts)))  # one of each kind: they differ in names only
    weights = {
        w.key: (w, counts[layer.layer_spec] if layer.layer_spec else 1)
        for layer in layers
        for w in layer.weights
    }

    def total(nbytes: Callable[[WeightSpec], int]) -> int:
        return sum(count * nbytes(weight) for weight, count in weights.values())

    nbytes = {"bfloat16": total(lambda weight: weight.nbytes(torch.bfloat16))}
    for codec in _CODECS:
        split = Split.of({"cpu": {"percent": 100, "codec": codec}})
        nbytes[codec] = total(place_weights(layers, split, torch.bfloat16).stored_bytes)
    nbytes["published"] = total(partial(published_bytes, dtype=spec.dtype, form=form))
    return SizeEntry(
        spec.name,
        known_repository(spec.name),
        spec.family,
        total(lambda weight: weight.numel),
        nbytes,
        form or str(spec.dtype).removeprefix("torch."),
        fit,
    )


def fit(spec: ModelSpec, hardware: Hardware, workload: Workload, lossy: bool = False) -> Fit:
    """The best policy that a quick search finds, with its prediction, or the reason why there is none.

    lossy: whether the policy may use codecs.
    """
    try:
        best = find_for_job(Job.checked(spec, hardware, workload), Auto({}, lossy), top=1, effort=SURVEY).best
    except CapacityError as error:
        return Fit(hardware.name, False, reason=str(error))
    except FlexGenError as error:
        # The text is too long for the model's positions, or the machine has no figures for its dtype.
        return Fit(hardware.name, None, reason=str(error))
    report = best.prediction.report
    return Fit(hardware.name, True, best.tokens_s, _placement(best.policy), str(report.bottleneck))


def _placement(policy: Policy) -> str:
    """The weights and the shape of a block in short, such as "weights 30% gpu, 70% cpu; 4 x 64 prompts"."""
    parts = [
        f"{policy.weights.percent(tier):g}% {tier}" + ("" if codec == "none" else f" in {codec}")
        for tier in Tier
        if policy.weights.percent(tier)
        for codec in [policy.weights[tier].codec]
    ]
    return f"weights {', '.join(parts)}; {policy.num_gpu_batches} x {policy.gpu_batch_size} prompts"


def _known(name: str) -> str:
    known = known_name(name)
    if known is None:
        raise ModelError(f"{shown(name)} is not a known size{did_you_mean(name.lower(), known_names())}; "
                         "`flexgen models` lists them")  # fmt: skip
    return known


def _default(family: str) -> list[ModelSpec]:
    """The spec of the default config of a family without known sizes; none if it is not a valid model."""
    try:
        return [spec_from_config(config_from_dict({"model_type": family}, family), family)]
    except ModelError:
        return []


def _features(specs: Iterable[ModelSpec]) -> tuple[str, ...]:
    """The features of at least one layer of one of these models."""
    found = dict.fromkeys(_FEATURES, False)
    for spec in specs:
        for layer in set(spec.layers):
            for name, has in _FEATURES.items():
                found[name] |= has(spec, layer)
    return tuple(name for name, has in found.items() if has)


_FEATURES: dict[str, Callable[[ModelSpec, LayerSpec], bool]] = {
    "experts": lambda spec, layer: isinstance(layer.mlp, MixtureSpec),
    "windows": lambda spec, layer: layer.attention.window is not None,
    "sinks": lambda spec, layer: layer.attention.scores.sinks,
    "caps": lambda spec, layer: layer.attention.scores.cap is not None or spec.logit_cap is not None,
    "ALiBi": lambda spec, layer: bool(layer.attention.scores.alibi),
    "parallel residuals": lambda spec, layer: layer.residual == "parallel",
}
"""What layers have that those of Llama do not have and that runs differently."""


Table = list[tuple[str, ...]]
"""Rows of cells, the first of them with the headings."""


def _families_table(families: Sequence[FamilyEntry]) -> Table:
    rows = [(f"`{one.name}`", one.about, ", ".join(one.features)) for one in families]
    return [("`model_type`", "Models", "Layers with"), *rows]


def _sizes_table(sizes: Sequence[SizeEntry]) -> Table:
    head = ["Name", "`model_type`", "Parameters", "bfloat16", *_CODECS, "As published"]
    with_fit = any(one.fit for one in sizes)
    rows = [tuple(head + (["Tokens/s", "Policy"] if with_fit else []))]
    for one in sizes:
        published = f"{_gigabytes(one.nbytes['published'])} ({one.published})"
        row = [f"`{one.name}`", f"`{one.family}`", _short(one.parameters)]
        row += [_gigabytes(one.nbytes[form]) for form in ("bfloat16", *_CODECS)] + [published]
        if one.fit:
            speed = "does not fit" if one.fit.fits is False else "-"
            row += [speed if one.fit.tokens_s is None else f"{one.fit.tokens_s:.4g}"]
            row += [one.fit.policy or (one.fit.reason or "").partition(":")[0]]
        rows.append(tuple(row))
    return rows


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.3g} GB" if nbytes < 1e12 else f"{nbytes / 1e12:.3g} TB"


def _short(parameters: int) -> str:
    return f"{parameters / 1e9:.3g}B" if parameters >= 999.5e6 else f"{parameters / 1e6:.3g}M"


def _markdown(table: Table) -> str:
    head, *rows = table
    return "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |") for row in (head, *rows)).replace(
        "\n", f"\n|{'---|' * len(head)}\n", 1
    )


def _aligned(table: Table) -> str:
    plain = [[cell.replace("`", "") for cell in row] for row in table]
    widths = [max(map(len, column)) for column in zip(*plain, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in plain)


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="flexgen models",
        formatter_class=HelpFormatter,
        description="List families and known sizes of models, and predict how fast they run on a machine.",
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="known sizes to list (default: all families and sizes)")
    add(
        "--hardware",
        metavar="NAME",
        help="also search for a policy on this machine: a preset (t4, l4, ...), a file NAME.toml, or `measured` for "
        "this machine. It takes a second or two for each size; many sizes use all cores",
    )
    add("--prompt-len", type=count, default=USUAL.prompt_len, metavar="N", help="tokens of each prompt")
    add("--gen-len", type=count, default=USUAL.gen_len, metavar="N", help="new tokens of each prompt")
    add("--num-prompts", type=count, default=USUAL.num_prompts, metavar="N", help="prompts of the job")
    add("--lossy", action="store_true", help="let policies use codecs, which round weights and cache")
    add("--markdown", action="store_true", help="print Markdown tables, as in docs/models.md")
    add(
        "--json",
        type=OutputFile,
        metavar="FILE",
        help="append the results to FILE as a line of JSON; - prints only this line",
    )
    return parser
