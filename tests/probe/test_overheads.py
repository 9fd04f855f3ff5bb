"""The fixed costs of cells: differences between runs of small models, with and without tapes."""

from types import SimpleNamespace

import pytest
import torch

from flexgen.probe import overheads
from flexgen.probe.effort import Effort
from flexgen.probe.overheads import _Decode, _SmallModel, _Took, cell_seconds, host_attention_seconds
from flexgen.results.trace import Event, LaneName
from flexgen.schedule.steps import Op, Step

EFFORT = Effort(hidden=256, layers=2, tokens=9)
LAYERS = 2 * 2 + 2


def took(**seconds):
    """The given times, and 9 s for those that must not be used."""
    return _Took(**(dict.fromkeys(("each", "outside", "first", "attention", "mlp", "ids"), 9.0) | seconds))


class Model(_SmallModel):
    """A model whose times are given, by (whether the cache is encoded, batches, tokens, whether the caches are
    emptied)."""

    times: dict = {}
    attending = 0.0

    def __init__(self, machine, lanes, dtype, num_layers, policy=overheads._POLICY):
        self._encoded = policy is overheads._ENCODED
        self.attending = num_layers / (2 * num_layers + 2)

    def cells(self, batches):
        return LAYERS * batches

    def took(self, batches, tokens, before=None):
        return self.times[self._encoded, batches, tokens, before is not None]


@pytest.fixture
def given(monkeypatch):
    """Use these times of models."""

    def use(times):
        monkeypatch.setattr(overheads, "_SmallModel", Model)
        monkeypatch.setattr(Model, "times", times)

    return use


@pytest.fixture
def found(given):
    def with_times(times, tapes):
        given(times)
        return cell_seconds(None, None, torch.bfloat16, EFFORT, tapes)

    return with_times


def test_a_device_without_tapes_has_the_times_of_a_model_whose_kernels_take_none(found):
    cell, attention = 2.0, 3.0
    each = 2 * (LAYERS * cell + 2 * attention)
    fixed = found({(False, 2, 9, False): took(each=each, attention=cell + attention, mlp=cell)}, False)
    assert fixed == pytest.approx({"cell": cell, "attention": attention})


def test_on_a_cpu_the_caches_are_empty_unless_one_call_repeats_all_layers(found):
    code, attention, outside, own, recording, ids, encoded = 2.0, 3.0, 0.375, 0.125, 6.0, 0.25, 1.5
    times = {
        (False, 1, 3, True): took(attention=attention + code, mlp=code, ids=ids),
        (True, 1, 3, True): took(attention=attention + code + encoded),
        (False, 2, 9, True): took(
            each=8.0,
            outside=outside,
            first=8.0 + 2 * (LAYERS - 1) * recording,
            attention=2 * own,
            mlp=0.0,
        ),
        (False, 1, 9, False): took(attention=0.3, mlp=0.1),
    }
    expected = dict(attention=attention, recording=recording, joined=0.2, encoded=encoded, ids=ids)
    expected |= {"cell": outside + code, "recorded": outside + own}
    assert found(times, True) == pytest.approx(expected)


def test_noise_gives_no_negative_cost_without_tapes(found):
    each = 2 * LAYERS * 1.0
    fixed = found({(False, 2, 9, False): took(each=each, attention=8.0, mlp=1.0)}, False)
    assert fixed["cell"] >= 0
    assert LAYERS * fixed["cell"] + EFFORT.layers * fixed["attention"] == pytest.approx(each / 2)


def test_noise_gives_no_negative_cost_and_does_not_hide_that_there_are_tapes(found):
    times = {
        (False, 1, 3, True): took(attention=1.0, mlp=2.0, ids=0.0),
        (True, 1, 3, True): took(attention=0.5),
        (False, 2, 9, True): took(each=1.0, outside=0.0, first=0.5, attention=0.0, mlp=0.0),
        (False, 1, 9, False): took(attention=0.0, mlp=0.0),
    }
    fixed = found(times, True)
    assert min(fixed.values()) >= 0
    assert all(0 < fixed[name] < 1e-6 for name in ("recorded", "joined"))


@pytest.mark.parametrize("shares_cores", [True, False])
def test_on_the_cores_of_the_host_a_cell_with_attention_there_has_a_time_of_its_own(shares_cores, given):
    """Of a pass, what cells without attention do not take."""
    cell, split, attend = 2.0, 11.0, 5.0
    each = 4 * ((LAYERS - 2) * cell + 2 * split)
    given({(False, 4, 9, False): took(each=each, attend=attend)})
    machine = SimpleNamespace(device=SimpleNamespace(shares_cores=shares_cores))
    found = host_attention_seconds(machine, None, torch.bfloat16, EFFORT, cell)
    assert found == pytest.approx({"attend": attend, "split": split} if shares_cores else {"attend": attend})


def test_what_empties_the_caches_reports_when_it_ran():
    caches = overheads._Caches(4096)
    for _ in range(3):
        caches()
    times = [time for both in caches.times for time in both]
    assert len(times) == 6 and times == sorted(times)


def computed(token, layer, seconds, op=Op.COMPUTE, batch=0):
    return Event(Step(op, token, layer, batch), LaneName.COMPUTE, 10.0 * token, 10.0 * token + seconds)


def test_times_are_those_of_the_decodes_middle_layers(monkeypatch):
    """Not of the prompt, of the pass that records, of the embedding, of the head or of a second batch."""
    events = [
        computed(token, layer, seconds + 100.0 * (token < 2))
        for token in range(4)
        for layer, seconds in enumerate((1.0, 0.75, 0.25, 1.25, 0.5, 1.0))
    ]
    events += [computed(token, 1, 0.5, batch=1) for token in range(4)]
    events += [computed(token, 5, 0.5, Op.STORE_HIDDEN) for token in range(4)]
    events += [computed(token, 3, 0.75, Op.ATTEND) for token in range(1, 4)]
    others = [(5.0, 6.0), (10.5, 11.5), (20.0, 21.0), (22.0, 24.0), (31.0, 39.0)]
    run = _Decode(events, [False, True, False, True, False, False], others)
    assert run.first() == [10.0 - 1.0] and run.passes() == [10.0 - 2.0, 10.0 - 2.0]
    model = object.__new__(_SmallModel)
    monkeypatch.setattr(model, "_decode", lambda batches, tokens, before: run)
    assert model.took(1, 4) == _Took(
        each=8.0,
        outside=(8.0 - 4.75 - 0.5 - 0.5 - 0.75) / 7,
        first=9.0,
        attention=1.0,
        mlp=0.375,
        ids=0.5,
        attend=0.75,
    )
