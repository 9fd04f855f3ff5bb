"""Fixtures: tiny random checkpoints on disk, and what it takes to stream them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import TINY
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from flexgen.layout.placement import Placement, place_weights
from flexgen.layout.plan import SLOTS
from flexgen.layout.rows import whole_weights
from flexgen.layout.weight_slots import slot_sizes
from flexgen.memory.homes import Homes
from flexgen.memory.lanes import Done, Lanes
from flexgen.memory.machine import Machine
from flexgen.memory.weights import WeightSlots
from flexgen.models import Layer, WeightSpec, build_layers, open_model
from flexgen.models.checkpoint import Checkpoint
from flexgen.models.sources import Source
from flexgen.policy import Split
from flexgen.schedule.steps import Op, Step

OPT = dict(
    vocab_size=101, hidden_size=36, num_hidden_layers=3, num_attention_heads=4, ffn_dim=77,
    max_position_embeddings=40, word_embed_proj_dim=36,
)  # fmt: skip
LLAMA = dict(
    vocab_size=101, hidden_size=40, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=70, max_position_embeddings=40, pad_token_id=0,
)  # fmt: skip


def _save(
    directory: Path, family: str, dtype: torch.dtype, format: str, number: int | None, **changes: Any
) -> Path:
    torch.manual_seed(0)
    if number is None and family == "opt":
        model = OPTForCausalLM(OPTConfig(**{**OPT, **changes}))
    elif number is None and family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**{**LLAMA, **changes}))
    else:
        fields = copy.deepcopy(TINY[family][number or 0])
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**{**fields, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.normal_()
    correction = {name: b.clone() for name, b in model.named_buffers() if name.endswith("correction_bias")}
    model = model.to(dtype)
    for name, buffer in correction.items():  # in float32 in any model, as published
        model.get_submodule(name.rpartition(".")[0]).register_buffer(name.rpartition(".")[2], buffer)
    model.config.dtype = dtype
    if format == "safetensors":
        model.save_pretrained(directory)
    else:
        model.config.save_pretrained(directory)
        torch.save(dict(model.state_dict()), directory / "pytorch_model.bin")
    return directory


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`saved("opt", torch.float16, "bin", num_hidden_layers=2)`: a directory, made once; not to be changed.

    `saved("qwen3", number=1)` has the second of the family's tiny configs. Without a number, the config of opt and
    llama is the one above, and that of another family its first.
    """
    made: dict[Any, Path] = {}

    def directory(
        family: str = "opt",
        dtype: torch.dtype = torch.float32,
        format: str = "safetensors",
        number: int | None = None,
        **changes: Any,
    ) -> Path:
        key = (family, dtype, format, number, *sorted(changes.items()))
        if key not in made:
            made[key] = _save(tmp_path_factory.mktemp("model"), family, dtype, format, number, **changes)
        return made[key]

    return directory


@dataclass
class Streamed:
    """A model whose weights are at home, with the slots and lanes that stream them."""

    layers: tuple[Layer, ...]
    checkpoint: Checkpoint
    placement: Placement
    dtype: torch.dtype
    machine: Machine
    homes: Homes
    slots: WeightSlots
    lanes: Lanes

    def __enter__(self) -> Streamed:
        return self

    def __exit__(self, *exc: object) -> None:
        """Closed before the end of the test; closing again does nothing."""
        self.lanes.close()
        self.machine.close()

    def slots_of(self, layer: int) -> list[int]:
        """The slots that serve the layer."""
        turns = self.slots.turns
        return [slot for slot in range(turns.count) if layer in turns.served(slot)]

    def slot(self, layer: int) -> int:
        """The slot of the layer's first visit."""
        return self.slots.turns.slot(0, layer)

    def bring(self, layer: int, slot: int, pieces: int = 1) -> None:
        """Run the work of all pieces of a layer, as the executor would."""
        dones = []
        for piece in range(pieces):
            step = Step(Op.LOAD_WEIGHTS, 0, layer, piece)
            for chain in self.slots.chains(layer, slot, piece, pieces):
                waits: tuple[Done, ...] = ()
                for lane, job in chain:
                    waits = (self.lanes[lane].submit(job, waits, step),)
                dones += waits
        for done in dones:
            done.wait()

    def assert_there(self, layer: int, slot: int) -> None:
        """The layer's weights are in the slot (or in place), bit by bit; a table that is gathered is not."""
        found = self.slots.weights(layer, slot, visit=0)
        whole = whole_weights(self.layers[layer], self.placement, self.machine.device.topology)
        others = set(found) - {weight.name for weight in whole}
        assert len(found) == len(whole) + len(others)
        # A mixture in place has its experts together too.
        assert others <= {f"experts.{name}.weight" for name in ("gate", "up", "down")}
        for weight in whole:
            tensor = found[weight.name]
            dense = (
                tensor.to_dense() if tensor.is_mkldnn else tensor
            )  # as the CPU's products want it laid out
            assert torch.equal(dense, self.checkpoint.read(weight, self.dtype)), weight.name


@pytest.fixture
def stream() -> Iterator[Callable[..., Streamed]]:
    """`stream(directory, split, device="cpu", offload_dir=None, dtype=..., weights="dummy")`, closed at the end."""
    with ExitStack() as stack:

        def opened(
            model: Any,
            split: Split,
            device: Any = "cpu",
            *,
            dtype: torch.dtype = torch.float32,
            offload_dir: Path | None = None,
            weights: Any = "checkpoint",
            fast_start: bool = False,
        ) -> Streamed:
            spec, checkpoint = open_model(model, weights)
            layers = build_layers(spec)
            return _stream_layers(layers, checkpoint, split, device, dtype, offload_dir, stack, fast_start)

        yield opened


@pytest.fixture(scope="session")
def stream_layers() -> Callable[..., Streamed]:
    """`stream_layers(layers, checkpoint, split, device, dtype, offload_dir, stack)`: `stack` closes it."""
    return _stream_layers


def _stream_layers(
    layers: tuple[Layer, ...],
    checkpoint: Checkpoint,
    split: Split,
    device: Any,
    dtype: torch.dtype,
    offload_dir: Path | None,
    stack: ExitStack,
    fast_start: bool = False,
) -> Streamed:
    machine = Machine.open(device, offload_dir)
    stack.callback(machine.close)
    placement = place_weights(layers, split, dtype)
    homes = Homes(checkpoint, placement, machine, fast_start)
    homes.load(layers)
    sizes = slot_sizes(layers, placement, machine.device.topology, SLOTS)
    slots = WeightSlots(layers, homes, sizes, placement, machine)
    lanes = machine.make_lanes()
    stack.callback(lanes.close)
    return Streamed(layers, checkpoint, placement, dtype, machine, homes, slots, lanes)


@dataclass(frozen=True, eq=False)
class Unit(Layer):
    """A layer that has weights and nothing else."""

    def forward(self, x: Any, weights: Any, ctx: Any) -> Any:
        raise NotImplementedError

    def flops(self, rows: int, seq: int, context: int) -> int:
        raise NotImplementedError

    def workspace_bytes(self, rows: int, seq: int, context: int, dtype: torch.dtype) -> int:
        raise NotImplementedError


@pytest.fixture(scope="session")
def make_layers() -> Callable[..., tuple[Layer, ...]]:
    """`make_layers([[3, 500], [7]])`: layers with one-dimensional weights of these lengths."""
    spec, _ = open_model("opt-125m", weights="dummy")

    def make(sizes: list[list[int]]) -> tuple[Layer, ...]:
        return tuple(
            Unit(
                spec,
                f"unit-{n}",
                tuple(WeightSpec(f"w{m}", (size,), (Source(f"{n}.w{m}"),)) for m, size in enumerate(row)),
            )
            for n, row in enumerate(sizes)
        )

    return make
