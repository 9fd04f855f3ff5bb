"""FlexGen's published throughput, compared with simulations of its policies (in its order and ours) and of ours.

    python benchmarks/paper_table.py

Prompt 512, 32 new tokens, one T4 (arXiv 2303.06865; README of FlexLLMGen at commit 004ffef). The policies are the
files of `policies/`. The first lines of each contain the command that simulates it, and this script runs the command.
Nothing is measured, so the figures are the same on any machine.
"""

from __future__ import annotations

import contextlib
import io
import json
import shlex
from pathlib import Path
from typing import Any

from record import RESULTS

from flexgen.errors import CapacityError
from flexgen.simulate import make_parser, simulate

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = {
    # model: tokens/s without and with compression. The paper has 8.70 for OPT-30B with compression.
    "opt-6.7b": (25.26, 29.12),
    "opt-30b": (7.32, 8.38),
    "opt-175b": (0.69, 1.12),
}
OUR_ORDER = "--order overlap_multi_batch"
COLUMNS = {
    # column: policy, changes of its command. `overlap_cpu_attention` would need a policy that leaves space for its
    # slots on the GPU.
    "original": ("{model}-t4-paper{codec}", ""),
    "our order": ("{model}-t4-paper{codec}", OUR_ORDER),
    "our order on t4": ("{model}-t4-paper{codec}", f"{OUR_ORDER} --hardware t4"),
    "searched, same constants": ("{model}-t4-paper-found{codec}", ""),
    "searched on t4": ("{model}-t4{codec}", ""),
}


def command(policy: Path) -> str:
    """The command in a policy's comment that simulates the policy."""
    lines = (line.removeprefix("# ") for line in policy.read_text(encoding="utf-8").splitlines())
    return next(line for line in lines if line.startswith("python -m flexgen.simulate "))


def simulated(policy: str, changes: str) -> dict[str, Any]:
    """The report of the policy's command with `changes`, or the reason why the policy is refused."""
    flags = shlex.split(f"{command(ROOT / policy)} {changes} --json -")[3:]
    out = io.StringIO()
    try:
        with contextlib.chdir(ROOT), contextlib.redirect_stdout(out):
            simulate(make_parser().parse_args(flags))
    except CapacityError as error:
        return {"refused": str(error)}
    report = json.loads(out.getvalue())
    keep = (
        "order", "num_prompts", "prefill_s", "decode_s", "phases", "stages", "bound_share", "throughput_tokens_s",
    )  # fmt: skip
    return {"hardware": report["device"]} | {key: _rounded(report[key]) for key in keep}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    rows = []
    for model, both in PUBLISHED.items():
        for codec, published in zip(("", "-int4"), both, strict=True):
            row: dict[str, Any] = {"model": model, "codec": codec.strip("-") or None, "published": published}
            for column, (pattern, changes) in COLUMNS.items():
                name = pattern.format(model=model, codec=codec)
                found = simulated(f"policies/{name}.toml", changes)
                if (speed := found.get("throughput_tokens_s")) is not None:
                    found["of_published"] = round(speed / published, 2)
                row[column] = {"policy": name} | found
                said = found.get("refused") or f"{speed} tokens/s, {found['of_published']} of the published"
                print(f"{name}, {column}: {said}", flush=True)
            rows.append(row)
    # Machine and versions are not recorded, because the figures do not depend on them.
    document = {
        "command": "python benchmarks/paper_table.py",
        "prompt_len": 512,
        "gen_len": 32,
        "rows": rows,
    }
    path = RESULTS / "paper_table.json"
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
