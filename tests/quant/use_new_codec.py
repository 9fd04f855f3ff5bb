"""Run, predict and search with the codec of `float32_codec.py`, which the package has found by its file."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from transformers import LlamaConfig

from flexgen import Auto, OptLM, Policy
from flexgen.models import open_model
from flexgen.predict.hardware import Hardware
from flexgen.predict.prediction import predict
from flexgen.search.find import find_policy
from flexgen.workload import Workload

NAME = "float32_codec"
CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=48, max_position_embeddings=64, initializer_range=0.3,
)  # fmt: skip
PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]


def main(folder: Path) -> None:
    thirds = ", ".join(f'{tier} = {{ percent = {n}, codec = "{NAME}" }}' for tier, n in
                       (("gpu", 34), ("cpu", 33), ("disk", 33)))  # fmt: skip
    (folder / "policy.toml").write_text(
        f"gpu_batch_size = 3\nweights = {{ {thirds} }}\ncache = {{ {thirds} }}\n", encoding="utf-8"
    )
    policy = Policy.load(folder / "policy.toml")
    plain = Policy(gpu_batch_size=3)
    for device in ("cpu", "emulated"):
        found = []
        for each in (
            plain,
            policy,
            policy,
        ):  # the last one finds the encoded weights in the offload directory
            with OptLM(
                CONFIG, each, device=device, dtype="float32", weights="dummy", offload_dir=folder / device
            ) as model:
                found.append(model.generate(PROMPTS, 8, stop=()))
        assert all(np.array_equal(ids, found[0]) for ids in found[1:]), found
    spec, _ = open_model("opt-125m", "dummy")
    hardware, workload = Hardware.preset("rtx-3090"), Workload(32, 4, 8)
    assert predict(spec, policy, hardware, workload).report.throughput_tokens_s > 0
    fixed = {"weights": policy.weights, "cache": policy.cache}
    assert find_policy(spec, hardware, workload, Auto(fixed)).best.policy.cache == policy.cache


if __name__ == "__main__":
    main(Path(sys.argv[1]))
