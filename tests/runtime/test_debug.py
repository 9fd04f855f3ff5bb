import pytest

from flexgen.errors import RequestError
from flexgen.runtime.call import Timing
from flexgen.runtime.debug import cost_table, projected_decode, summary, tokens_to_run
from flexgen.schedule import Op, Step
from flexgen.trace import Event, LaneName, Phase, Trace

EVENTS = [
    Event(Step(Op.COMPUTE, 1, 0, 0), LaneName.COMPUTE, 3.0, 3.5),
    Event(Step(Op.LOAD_WEIGHTS, 0, 0, 0), LaneName.DISK_READ, 0.0, 1.0),
    Event(Step(Op.COMPUTE, 0, 0, 0), LaneName.COMPUTE, 1.0, 3.0),
    Event(Step(Op.COMPUTE, 2, 0, 0), LaneName.COMPUTE, 4.0, 5.0),
]


@pytest.mark.parametrize(
    ("asked", "cut", "mode", "run"),
    [
        (32, None, None, 32), (32, None, "fewer_batch", 4), (32, None, "breakdown", 4), (3, None, "breakdown", 3),
        (32, 8, None, 8), (32, 8, "fewer_batch", 8), (32, 64, None, 32),
    ],
)  # fmt: skip
def test_how_many_tokens_run(asked, cut, mode, run):
    assert tokens_to_run(asked, cut, mode) == run


@pytest.mark.parametrize(("cut", "mode"), [(0, None), (2.0, None), (None, "profile"), (None, "")])
def test_what_cannot_be_meant(cut, mode):
    with pytest.raises(RequestError):
        tokens_to_run(8, cut, mode)


def test_decode_is_projected_from_the_tokens_that_follow_the_first():
    assert projected_decode(3.0, 4, 32) == 31.0
    assert projected_decode(0.25, 1, 32) == 0.25


def test_costs_by_phase_operation_and_lane():
    table = cost_table(EVENTS)
    assert table == {
        (Phase.PREFILL, Op.LOAD_WEIGHTS, LaneName.DISK_READ): (1, 1.0),
        (Phase.PREFILL, Op.COMPUTE, LaneName.COMPUTE): (1, 2.0),
        (Phase.DECODE, Op.COMPUTE, LaneName.COMPUTE): (2, 1.5),
    }
    assert [phase for phase, *_ in table] == [Phase.PREFILL, Phase.PREFILL, Phase.DECODE]


def test_a_summary_has_the_table_only_where_it_is_asked_for():
    timing = Timing(prefill=3.0, total=5.0, trace=Trace(EVENTS))
    (line,) = summary(timing, 2, 6, 3, 5, "fewer_batch").splitlines()
    assert line == "2 prompts, 6 new tokens: prefill 3 s, decode 4 s (projected from 3 tokens)"
    told, *rows = summary(timing, 2, 6, 3, 3, "breakdown").splitlines()
    assert "projected" not in told and "decode 2 s" in told
    assert [row.split()[:3] for row in rows] == [
        ["prefill", "load_weights", "disk_read"],
        ["prefill", "compute", "compute"],
        ["decode", "compute", "compute"],
    ]
    assert rows[2].split()[3:] == ["2", "x", "750", "ms", "=", "1.5", "s"]
