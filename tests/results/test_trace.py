"""The sums of a trace, and the file that trace viewers read."""

import json

import pytest

from flexgen.results.trace import Event, LaneName, Trace
from flexgen.schedule.steps import Op, Step

LOAD, COMPUTE, LATER = Step(Op.LOAD_WEIGHTS, 0, 1, 2), Step(Op.COMPUTE, 0, 1, 0), Step(Op.COMPUTE, 1, 0, 3)
EVENTS = [
    Event(LOAD, LaneName.DISK_READ, 0.5, 1.0),
    Event(LOAD, LaneName.TO_DEVICE, 1.0, 1.25),
    Event(COMPUTE, LaneName.COMPUTE, 1.25, 2.25),
    Event(LATER, LaneName.COMPUTE, 3.0, 3.5),
]


def test_an_empty_trace():
    trace = Trace()
    assert not trace
    assert (trace.span, trace.busy()) == (0.0, {})


def test_span_is_from_the_first_start_to_the_last_end():
    assert Trace(list(EVENTS)).span == 3.0
    assert Trace(EVENTS[::-1]).span == 3.0


def test_busy_sums_each_lane():
    assert Trace(EVENTS).busy() == {
        LaneName.DISK_READ: 0.5,
        LaneName.TO_DEVICE: 0.25,
        LaneName.COMPUTE: 1.5,
    }


def test_extend_shifts_the_clock():
    trace = Trace(EVENTS[:1])
    trace.extend(EVENTS[2:], offset=10.0)
    assert trace.events == [
        EVENTS[0],
        Event(COMPUTE, LaneName.COMPUTE, 11.25, 12.25),
        Event(LATER, LaneName.COMPUTE, 13.0, 13.5),
    ]
    assert trace.span == 13.0


def test_traces_do_not_share_events():
    first = Trace()
    first.extend(EVENTS)
    assert Trace().events == []


def test_save_writes_the_format_of_trace_viewers(tmp_path):
    path = tmp_path / "trace.json"
    Trace(EVENTS).save(path, layer_names=["embed", "attention-0"])
    document = json.loads(path.read_text())
    rows = {e["args"]["name"]: e["tid"] for e in document["traceEvents"] if e["ph"] == "M"}
    assert set(rows) == {str(lane) for lane in LaneName}
    assert len(set(rows.values())) == len(LaneName)
    complete = [e for e in document["traceEvents"] if e["ph"] == "X"]
    assert len(complete) == len(EVENTS) and len(document["traceEvents"]) == len(EVENTS) + len(LaneName)
    for written, event in zip(complete, EVENTS, strict=True):
        assert written["tid"] == rows[str(event.lane)]
        assert written["ts"] == pytest.approx(event.start * 1e6)
        assert written["dur"] == pytest.approx((event.end - event.start) * 1e6)
        assert written["cat"] == event.step.op.name.lower()
        token, layer, batch = event.step[1:]
        assert written["args"] == {"token": token, "layer": layer, "batch": batch}
    assert [e["name"] for e in complete] == [
        "load_weights attention-0",
        "load_weights attention-0",
        "compute attention-0",
        "compute embed",
    ]


def test_save_without_names_numbers_the_layers(tmp_path):
    path = tmp_path / "trace.json"
    Trace(EVENTS[2:3]).save(path)
    (event,) = (e for e in json.loads(path.read_text())["traceEvents"] if e["ph"] == "X")
    assert event["name"] == "compute 1"
