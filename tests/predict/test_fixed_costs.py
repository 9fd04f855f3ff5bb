"""The fixed seconds of cells: those that are repeated from tapes cost less, and least if one call repeats all."""

import pytest
import torch

from flexgen import Policy
from flexgen.layout import tapes
from flexgen.layout.placement import place_weights
from flexgen.models import build_layers, open_model
from flexgen.predict.fixed_costs import FixedCosts
from flexgen.predict.placed import PlacedModel
from flexgen.predict.prediction import predict
from flexgen.workload import Workload

CELL, ATTENTION, RECORDING, RECORDED, JOINED = 16.0, 4.0, 8.0, 2.0, 1.0
FIXED = dict(cell=CELL, attention=ATTENTION, recording=RECORDING, recorded=RECORDED, joined=JOINED)
IN_PLACE = {name: {"cpu": 100} for name in ("weights", "cache", "activations")}
EMBED, ATTENDS, MLP, HEAD = 0, 1, 2, 5
"""Layers of the model: an embedding, two attentions and MLPs, and a head."""


@pytest.fixture
def seconds(configs, host):
    """The seconds of cells in pass `token`, by layer."""

    def of(token, batches=1, fixed=FIXED, new=8, workload=None, **changes):
        policy = Policy(**{"gpu_batch_size": 2, "num_gpu_batches": batches, **IN_PLACE, **changes})
        spec, _ = open_model(configs["llama, grouped"], "dummy")
        layers = build_layers(spec, policy.sep_layer)
        placement = place_weights(layers, policy.weights, torch.bfloat16)
        model = PlacedModel(layers, placement, host(fixed=fixed))
        workload = workload or Workload(6, new, 2 * batches)
        costs = FixedCosts(model, policy, workload, [2] * batches, False)
        return [costs.of_cell(model.alike.cells[j], token) for j in range(len(layers))]

    return of


def computed(found):
    return [found[j] for j in (EMBED, ATTENDS, MLP, HEAD)]


def test_the_prompt_is_computed(seconds):
    assert computed(seconds(0)) == [CELL, CELL + ATTENTION, CELL, CELL]


def test_cells_are_recorded_before_the_first_pass_of_the_decode(seconds):
    joined, alone = JOINED + RECORDING, RECORDED + RECORDING
    assert computed(seconds(1)) == [CELL, joined, joined, joined]
    assert computed(seconds(1, cache={"disk": 100})) == [CELL, CELL + ATTENTION, alone, alone]


def test_if_nothing_moves_one_call_repeats_all_layers(seconds):
    assert computed(seconds(2)) == [CELL, JOINED, JOINED, JOINED]


@pytest.mark.parametrize("changes", [{"batches": 2}, {"guess": 1}, {"activations": {"disk": 100}}], ids=str)
def test_otherwise_they_are_repeated_one_by_one(seconds, changes):
    assert computed(seconds(2, **changes)) == [CELL, RECORDED, RECORDED, RECORDED]


def test_cells_whose_data_moves_are_computed(seconds):
    assert computed(seconds(2, cache={"disk": 100})) == [CELL, CELL + ATTENTION, RECORDED, RECORDED]
    coded = {"cpu": {"percent": 100, "codec": "int8"}}
    assert computed(seconds(2, cache=coded)) == [CELL, CELL + ATTENTION, RECORDED, RECORDED]


@pytest.mark.parametrize(
    "changes",
    [
        {"fixed": dict(cell=CELL, attention=ATTENTION)},
        {"new": tapes.MIN_TOKENS},
        {"workload": Workload(6, 8, 2, mean_new=3)},
        {"weights": {"disk": 100}},
    ],
    ids=["a device without tapes", "few tokens", "rows that end early", "weights on disk"],
)
def test_runs_without_tapes(seconds, changes):
    for token in (1, 2):
        assert computed(seconds(token, **changes)) == [CELL, CELL + ATTENTION, CELL, CELL]


def test_beyond_the_memory_of_tapes_cells_are_computed(seconds, monkeypatch):
    monkeypatch.setattr("flexgen.predict.fixed_costs.MOST_BYTES", 1)
    assert computed(seconds(2)) == pytest.approx([CELL, CELL + ATTENTION, CELL, CELL], rel=1e-3)
    assert seconds(1)[MLP] == pytest.approx(CELL + RECORDING, rel=1e-3), (
        "a tape that is not kept was recorded"
    )


def test_a_decode_in_memory_takes_as_long_as_its_cells(configs, host):
    spec, _ = open_model(configs["llama, grouped"], "dummy")
    fast = {"bfloat16": 1e15}
    machine = host(
        fixed=FIXED,
        products={"bfloat16": [[8, 1e15]]},
        prefill_attention=fast,
        device_attention=fast,
        computes_in={},
    )
    policy = Policy(gpu_batch_size=2, **IN_PLACE)
    report = predict(spec, policy, machine, Workload(6, 10, 2), dtype="bfloat16").report
    assert report.decode_s == pytest.approx(9 * (CELL + 5 * JOINED) + 5 * RECORDING, rel=1e-6)
