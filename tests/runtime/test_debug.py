import pytest

from flexgen.errors import RequestError
from flexgen.results.trace import Event, LaneName, Phase, Trace
from flexgen.runtime.call import Timing
from flexgen.runtime.debug import cost_table, projected_decode, summary, tokens_to_run
from flexgen.schedule.steps import Op, Step

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


def test_figures_of_all_tokens_need_a_decode():
    assert tokens_to_run(32, 1, None) == 1, "the prefill alone may be run"
    assert tokens_to_run(1, 1, None, projected=True) == 1
    assert tokens_to_run(32, 2, None, projected=True) == 2
    with pytest.raises(RequestError, match="cut_gen_len is 1: the decode of 32 .* at least 2"):
        tokens_to_run(32, 1, None, projected=True)


def test_decode_is_projected_from_the_tokens_that_follow_the_first():
    assert projected_decode(Timing(total=3.0, ran=[4]), 32) == 31.0
    assert projected_decode(Timing(total=3.0, ran=[4, 4, 4]), 32) == 31.0
    assert projected_decode(Timing(total=0.25, ran=[1, 1]), 32) is None


def test_tokens_that_did_not_run_take_no_part_in_a_projection():
    assert projected_decode(Timing(total=4.0, ran=[3]), 32) == 62.0, "all rows ended with the third of 16"
    assert projected_decode(Timing(total=4.0, ran=[1, 5]), 32) == 62.0


def test_costs_by_phase_operation_and_lane():
    table = cost_table(EVENTS)
    assert table == {
        (Phase.PREFILL, Op.LOAD_WEIGHTS, LaneName.DISK_READ): (1, 1.0),
        (Phase.PREFILL, Op.COMPUTE, LaneName.COMPUTE): (1, 2.0),
        (Phase.DECODE, Op.COMPUTE, LaneName.COMPUTE): (2, 1.5),
    }
    assert [phase for phase, *_ in table] == [Phase.PREFILL, Phase.PREFILL, Phase.DECODE]


def test_a_summary_has_the_table_only_where_it_is_asked_for():
    timing = Timing(prefill=3.0, total=5.0, trace=Trace(EVENTS), ran=[3])
    (line,) = summary(timing, 2, 6, 3, 5, "fewer_batch").splitlines()
    assert line == "2 prompts, 6 new tokens: prefill 3 s, decode 4 s (projected from 3 tokens)"
    alone = Timing(prefill=3.0, total=3.0, ran=[1])
    assert summary(alone, 2, 2, 1, 5, None).endswith(
        "decode unknown: one token is not enough for a projection"
    )
    first, *rows = summary(timing, 2, 6, 3, 3, "breakdown").splitlines()
    assert "projected" not in first and "decode 2 s" in first
    assert [row.split()[:3] for row in rows] == [
        ["prefill", "load_weights", "disk_read"],
        ["prefill", "compute", "compute"],
        ["decode", "compute", "compute"],
    ]
    assert rows[2].split()[3:] == ["2", "x", "750", "ms", "=", "1.5", "s"]
