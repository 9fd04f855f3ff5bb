"""The fixed costs of cells: differences between runs of small models, with and without tapes."""

from types import SimpleNamespace

import pytest
import torch

from flexgen.probe import overheads
from flexgen.probe.effort import Effort
from flexgen.probe.overheads import _SmallModel, _Took, cell_seconds, host_attention_seconds
from flexgen.results.trace import Event, LaneName
from flexgen.schedule.steps import Op, Step

EFFORT = Effort(hidden=256, layers=2, tokens=9)
LAYERS = 2 * 2 + 2


class Model(_SmallModel):
    """A model whose times are given, by (hidden size, whether the cache is encoded, batches, tokens)."""

    times: dict = {}

    def __init__(self, machine, lanes, dtype, num_layers, hidden, policy=overheads._POLICY):
        self._key = hidden, policy is overheads._ENCODED
        self.attending = num_layers / (2 * num_layers + 2)

    attending = 0.0

    def cells(self, batches):
        return LAYERS * batches

    def took(self, batches, tokens):
        return self.times[(*self._key, batches, tokens)]


@pytest.fixture
def found(monkeypatch):
    def with_times(times, tapes):
        monkeypatch.setattr(overheads, "_SmallModel", Model)
        monkeypatch.setattr(Model, "times", times)
        return cell_seconds(None, None, torch.bfloat16, EFFORT, tapes)

    return with_times


def test_a_device_without_tapes_has_the_times_of_a_model_whose_kernels_take_none(found):
    cell, attention = 2.0, 3.0
    each = 2 * (LAYERS * cell + 2 * attention)
    fixed = found({(64, False, 2, 9): _Took(each, cell + attention, cell, 9.0)}, False)
    assert fixed == pytest.approx({"cell": cell, "attention": attention})


def test_on_a_cpu_the_kernels_are_those_of_the_run_in_one_call(found):
    code, attention, recorded, ids, encoded = 2.0, 3.0, 0.5, 0.25, 1.5
    times = {
        (128, False, 1, 3): _Took(9.0, 7.0 + attention + code, 5.0 + code, ids),
        (128, False, 1, 9): _Took(9.0, 7.0, 5.0, 9.0),
        (128, True, 1, 3): _Took(9.0, 7.0 + attention + code + encoded, 9.0, 9.0),
        (64, False, 1, 9): _Took(9.0, 0.3, 0.1, 9.0),
        (64, False, 2, 9): _Took(2 * LAYERS * recorded, 9.0, 9.0, 9.0),
    }
    expected = dict(attention=attention, recorded=recorded, joined=0.2, encoded=encoded, ids=ids)
    assert found(times, True) == pytest.approx({"cell": recorded + code, **expected})


def test_noise_gives_no_negative_cost_and_does_not_hide_that_there_are_tapes(found):
    times = {
        (128, False, 1, 3): _Took(1.0, 1.0, 1.0, 0.0),
        (128, False, 1, 9): _Took(2.0, 2.0, 2.0, 0.0),
        (128, True, 1, 3): _Took(1.0, 0.5, 0.0, 0.0),
        (64, False, 1, 9): _Took(0.0, 0.0, 0.0, 0.0),
        (64, False, 2, 9): _Took(0.0, 0.0, 0.0, 0.0),
    }
    fixed = found(times, True)
    assert min(fixed.values()) >= 0
    assert all(0 < fixed[name] < 1e-6 for name in ("cell", "recorded", "joined"))


@pytest.mark.parametrize("shares_cores", [True, False])
def test_on_the_cores_of_the_host_a_cell_with_attention_there_has_a_time_of_its_own(
    shares_cores, monkeypatch
):
    """Of a pass, what cells without attention do not take."""
    cell, split, attend = 2.0, 11.0, 5.0
    each = 4 * ((LAYERS - 2) * cell + 2 * split)
    monkeypatch.setattr(overheads, "_SmallModel", Model)
    monkeypatch.setattr(Model, "times", {(64, False, 4, 9): _Took(each, 9.0, 9.0, 9.0, attend)})
    machine = SimpleNamespace(device=SimpleNamespace(shares_cores=shares_cores))
    found = host_attention_seconds(machine, None, torch.bfloat16, EFFORT, cell)
    assert found == pytest.approx({"attend": attend, "split": split} if shares_cores else {"attend": attend})


def computed(token, layer, seconds, op=Op.COMPUTE):
    return Event(Step(op, token, layer, 0), LaneName.COMPUTE, 10.0 * token, 10.0 * token + seconds)


def test_times_are_those_of_the_decodes_middle_layers(monkeypatch):
    """Not of the prompt, of the pass that records, of the embedding or of the head."""

    class Layer:
        def __init__(self, has_cache):
            self.has_cache = has_cache

    attending = [False, True, False, True, False, False]
    model = object.__new__(_SmallModel)
    model._layers = [Layer(cached) for cached in attending]
    events = [
        computed(token, layer, seconds + 100.0 * (token < 2))
        for token in range(4)
        for layer, seconds in enumerate((9.0, 3.0, 1.0, 5.0, 2.0, 9.0))
    ]
    events += [computed(token, 5, 0.5, Op.STORE_HIDDEN) for token in range(4)]
    events += [computed(token, 3, 0.75, Op.ATTEND) for token in range(1, 4)]
    monkeypatch.setattr(model, "_events", lambda batches, tokens: events)
    assert model.took(1, 4) == _Took(each=10.0, attention=4.0, mlp=1.5, ids=0.5, attend=0.75)
