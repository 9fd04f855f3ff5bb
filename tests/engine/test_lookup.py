"""An embedding that is off the compute device: ids are transformers', and only rows of it travel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, OPTConfig

from flexgen.engine.model import OptLM
from flexgen.memory.disk import DiskIO
from flexgen.memory.gpu import EmulatedDevice
from flexgen.policy import Policy
from flexgen.quant import CODECS
from flexgen.schedule.orders import ORDERS

LENGTHS = [3, 7, 5, 9, 2, 6, 4, 8]
NAMES = ["opt", "opt post-norm projected", "opt untied", "llama gqa 2", "llama gqa 1 with biases, tied"]
CASES = [("cpu", "disk"), ("emulated", "disk"), ("emulated", "cpu")]
cases = pytest.mark.parametrize(("device", "tier"), CASES)

# A vocabulary that is most of the model.
VOCAB, HIDDEN = 3000, 64
_SIZES = dict(vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=4)
WIDE: dict[str, OPTConfig | LlamaConfig] = {
    "opt tied": OPTConfig(**_SIZES, ffn_dim=64, word_embed_proj_dim=HIDDEN, max_position_embeddings=48),
    "llama untied": LlamaConfig(**_SIZES, intermediate_size=64, max_position_embeddings=48),
}


@cases
@pytest.mark.parametrize("order", sorted(ORDERS))
@pytest.mark.parametrize("name", NAMES)
def test_greedy_ids(
    name: str, order: str, device: str, tier: str, tiny: Any, prompts: Any, mixed: Any
) -> None:
    model, given = tiny(name), prompts(LENGTHS)
    with OptLM(model.directory, mixed(weights={tier: 100}), device=device, progress=False, order=order) as lm:
        assert lm._opened().table is not None
        np.testing.assert_array_equal(lm.generate(given, 6, stop=()), model.greedy(given, 6))
        # The same buffers hold another call's rows.
        np.testing.assert_array_equal(lm.generate(given[:3], 3, stop=()), model.greedy(given[:3], 3))


@cases
def test_logits(device: str, tier: str, tiny: Any, prompts: Any, mixed: Any) -> None:
    model, ids = tiny("opt post-norm projected"), torch.tensor(prompts([9] * 7))
    with OptLM(model.directory, mixed(weights={tier: 100}), device=device, progress=False) as lm:
        ours = lm.forward(ids)
    torch.testing.assert_close(ours, model.logits(ids, torch.ones_like(ids)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("codec", sorted(CODECS))
@cases
def test_encoded_rows_give_what_the_resident_table_gives(
    device: str, tier: str, codec: str, prompts: Any
) -> None:
    given = prompts(LENGTHS)
    answers = []
    for where in ("gpu", tier):
        policy = Policy(
            gpu_batch_size=4, num_gpu_batches=2, weights={where: {"percent": 100, "codec": codec}}
        )  # type: ignore[dict-item]
        with OptLM(
            WIDE["opt tied"], policy, device=device, dtype="float32", weights="dummy", progress=False
        ) as lm:
            assert (lm._opened().table is None) == (where == "gpu")
            answers.append(lm.forward(given))
    # Rows are decoded in another arrangement, on another device: the same numbers all the same.
    torch.testing.assert_close(answers[1], answers[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", sorted(WIDE))
@cases
def test_traffic_of_the_first_layer_is_rows(
    name: str, device: str, tier: str, prompts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All bytes that are read (or cross the link) belong to layers that move or are a few blocks per row."""
    moved: list[int] = []
    if tier == "disk":
        begin = DiskIO._begin

        def counted(io: Any, pieces: Any, *args: Any, **options: Any) -> Any:
            moved.extend(tensor.numel() for _, _, tensor, _ in pieces)
            return begin(io, pieces, *args, **options)

        monkeypatch.setattr(DiskIO, "_begin", counted)
    else:
        to_device = EmulatedDevice.to_device

        def copied(device: Any, target: Any, source: Any) -> None:
            moved.append(source.nbytes)
            to_device(device, target, source)

        monkeypatch.setattr(EmulatedDevice, "to_device", copied)
    given, tokens = prompts([5] * 4), 6
    policy = Policy(gpu_batch_size=2, num_gpu_batches=2, weights={tier: 100}, activations={"gpu": 100})
    with OptLM(
        WIDE[name],
        policy,
        device=device,
        dtype="float32",
        weights="dummy",
        offload_dir=tmp_path,
        progress=False,
    ) as lm:
        weights = lm._opened().weights
        table = VOCAB * HIDDEN * 4
        assert weights.layouts[0].nbytes < table / 4, "what is left is the positions"
        head = weights.layouts[len(lm.layer_names) - 1].nbytes
        assert head >= table, "the head needs all of it"
        layers = sum(weights.layouts[n].nbytes for n in range(len(lm.layer_names)))
        moved.clear()
        lm.generate(given, tokens, stop=())
        if tier == "disk":
            rows, block = 4 * (5 + tokens - 1), 2 * 4096
            # Rows that are close together are one read, with the bytes between them.
            assert tokens * layers < sum(moved) <= tokens * layers + rows * (block + 64 * 1024)
            decode = 4 * (block + 64 * 1024)
            assert decode < table
        else:
            ids = 4 * (5 + tokens - 1)
            assert tokens * layers < sum(moved) <= tokens * layers + ids * (HIDDEN * 4 + 8)
