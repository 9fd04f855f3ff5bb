"""The runs that `prediction.py` predicts: a set that the cost model was developed with, and a set that it was not.

The second set is held out: a seeded draw chose its policies, prompts and dtypes before any of them was run or
predicted. Do not edit a held-out case, and do not choose another seed after looking at its results. If you change the
cost model because of a held-out case, increase `SEED` and report the new set.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

from shapes import SHAPES
from transformers import OPTConfig, PretrainedConfig

from flexgen import Policy

LIMITED = "emulated:memory=3GiB,link=4GiB,disk=1GiB"
GPU, CPU, DISK = {"gpu": 100}, {"cpu": 100}, {"disk": 100}

SEED = 21
_HELD_OUT = 12
_MOST_PROMPT_TOKENS = 1024
"""Prompt tokens of a held-out case. It limits the seconds of a prefill on two cores."""


class Case(NamedTuple):
    device: str
    policy: Policy
    prompt_len: int
    new_tokens: int
    dtype: str = "bfloat16"
    order: str | None = None


class CaseSet(NamedTuple):
    """Cases of one model.

    results: the name of the JSON file.
    median, worst: the largest errors that meet the target.
    """

    results: str
    model: PretrainedConfig
    description: str
    cases: dict[str, Case]
    median: float
    worst: float


def _policy(batch: int, batches: int = 1, **fields: Any) -> Policy:
    given: dict[str, Any] = {"weights": CPU, "cache": CPU, "activations": CPU} | fields
    return Policy(gpu_batch_size=batch, num_gpu_batches=batches, **given)


def _coded(codec: str, tier: str = "cpu") -> dict[str, Any]:
    return {tier: {"percent": 100, "codec": codec}}


ON_GPU: dict[str, Any] = {"weights": GPU, "cache": GPU, "activations": GPU}
DEVELOPED = CaseSet(
    "prediction",
    OPTConfig(
        hidden_size=2048, ffn_dim=8192, num_hidden_layers=4, num_attention_heads=32, word_embed_proj_dim=2048
    ),
    "4 layers of the OPT-1.3B shape, random weights",
    {
        "cpu: in memory, 1 x 8": Case("cpu", _policy(8), 64, 16),
        "cpu: in memory, 2 x 16, float32": Case("cpu", _policy(16, 2), 32, 12, "float32"),
        "cpu: long prompts, 1 x 2": Case("cpu", _policy(2), 512, 16),
        "cpu: weights on disk, 1 x 8": Case("cpu", _policy(8, weights=DISK), 64, 8),
        "cpu: weights on disk, 1 x 8, normal": Case("cpu", _policy(8, weights=DISK, overlap=False), 64, 8),
        "cpu: weights on disk, 4 x 8": Case("cpu", _policy(8, 4, weights=DISK), 32, 8),
        "cpu: weights half on disk, 2 x 8": Case(
            "cpu", _policy(8, 2, weights={"cpu": 50, "disk": 50}), 64, 8
        ),
        "cpu: cache on disk, 4 x 8": Case("cpu", _policy(8, 4, cache=DISK), 64, 8),
        "cpu: int4 weights, 1 x 4": Case("cpu", _policy(4, weights=_coded("int4")), 64, 24),
        "cpu: int8 weights on disk, 2 x 24": Case(
            "cpu", _policy(24, 2, weights=_coded("int8", "disk")), 32, 8
        ),
        "cpu: int4 cache, 1 x 32": Case("cpu", _policy(32, cache=_coded("int4")), 64, 12),
        "emulated: in device memory, 2 x 8": Case(LIMITED, _policy(8, 2, **ON_GPU), 64, 12),
        "emulated: weights in host memory, 4 x 8": Case(
            LIMITED, _policy(8, 4, weights=CPU, cache=GPU, activations=GPU), 32, 8
        ),
        "emulated: cache fetched, 2 x 16": Case(
            LIMITED, _policy(16, 2, weights=GPU, attend_on="gpu"), 64, 12
        ),
        "emulated: host attends, 4 x 16": Case(LIMITED, _policy(16, 4, weights=GPU, sep_layer=False), 64, 12),
        "emulated: weights on disk, int4, 4 x 16": Case(
            LIMITED, _policy(16, 4, weights=_coded("int4", "disk"), cache=GPU, activations=GPU), 32, 12
        ),
        "emulated: all tiers, normal, 2 x 8": Case(
            LIMITED,
            _policy(
                8,
                2,
                weights={"gpu": 40, "cpu": 30, "disk": 30},
                cache=GPU,
                activations=GPU,
                overlap=False,
            ),
            64,
            8,
        ),
    },
    median=0.10,
    worst=0.25,
)


def draw(seed: int, count: int) -> dict[str, Case]:
    """`count` random cases on the CPU: policies, prompts and dtypes."""
    chance = random.Random(seed)
    cases: dict[str, Case] = {}
    while len(cases) < count:
        batch, batches = chance.choice((1, 2, 4, 8, 16, 32)), chance.choice((1, 1, 2, 4))
        prompt_len, new_tokens = chance.choice((16, 32, 64, 128, 256, 512)), chance.randint(6, 16)
        dtype = chance.choice(("bfloat16", "bfloat16", "float16"))
        codec, on_disk = chance.choice((None, None, "int8", "int4")), chance.choice((0, 0, 25, 50, 75, 100))
        cache = chance.choice((CPU, CPU, CPU, DISK, _coded("int8"), _coded("int4")))
        overlap = chance.random() < 0.8
        if batch * batches * prompt_len > _MOST_PROMPT_TOKENS:
            continue
        shares = {"cpu": 100 - on_disk, "disk": on_disk}
        weights = {
            tier: {"percent": share, "codec": codec or "none"} for tier, share in shares.items() if share
        }
        policy = _policy(batch, batches, weights=weights, cache=cache, overlap=overlap)
        stored = "disk" if cache is DISK else "plain" if cache is CPU else cache["cpu"]["codec"]
        name = f"{len(cases) + 1}: {batches} x {batch}, {prompt_len} + {new_tokens}, {dtype}"
        name += f", weights {codec or 'plain'}, {on_disk}% on disk, cache {stored}"
        name += "" if overlap else ", normal"
        cases[name] = Case("cpu", policy, prompt_len, new_tokens, dtype)
    return cases


HELD_OUT = CaseSet(
    "prediction_held_out",
    SHAPES["llama-1b-32k"],
    "Llama shape with 1.04B random weights (16 layers, hidden 2048, 8 KV heads, vocabulary 32,000, tied)",
    draw(SEED, _HELD_OUT),
    median=0.08,
    worst=0.20,
)
