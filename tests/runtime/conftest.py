"""What the runtime's parts are given: a spec, machines, and a way to run chains without lanes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
from transformers import OPTConfig

from flexgen.memory.machine import Machine
from flexgen.memory.transfer import Chains
from flexgen.models import ModelSpec, open_model


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def spec() -> ModelSpec:
    """A vocabulary of 64 (pad 1, end 2), 48 positions, hidden size 32."""
    config = OPTConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48,
        max_position_embeddings=48, word_embed_proj_dim=32, pad_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return open_model(config, weights="dummy")[0]


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], AbstractContextManager[Machine]]:
    """`with machine("emulated") as m`: a machine with a folder of its own, empty again at the end."""

    @contextmanager
    def opened(device: str) -> Iterator[Machine]:
        folder: Path = tmp_path_factory.mktemp("offload")
        machine = Machine.open(device, folder, pin=False)
        try:
            yield machine
            assert machine.host.used == machine.device.memory.used == machine.disk.used == 0
            assert not [path for path in folder.rglob("*") if path.is_file()]
        finally:
            machine.close()

    return opened


@pytest.fixture(scope="session")
def run() -> Callable[[Chains], None]:
    """Do the work of a step here and now."""

    def run_here(chains: Chains) -> None:
        for chain in chains:
            for stage in chain:
                stage.job()

    return run_here
