import pytest

from flexgen.errors import RequestError
from flexgen.flex_opt import OptLM, project_decode_latency, timers
from flexgen.flex_opt.timer import Timer, Timers

PROMPTS = [[5, 6, 7], [8, 9, 10], [11, 12, 13]]


def test_a_timer(monkeypatch):
    clock = iter([1.0, 3.0, 10.0, 14.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    timer, waited = Timer("mine"), []
    for _ in range(2):
        timer.start(lambda: waited.append("start"))
        assert timer.started
        timer.stop(lambda: waited.append("stop"))
    assert timer.costs == [2, 4] and waited == ["start", "stop"] * 2
    assert (timer.elapsed(), timer.elapsed("sum")) == (3, 6)
    timer.reset()
    assert timer.costs == [] and timer.elapsed() == timer.elapsed("sum") == 0


def test_wrong_uses_of_a_timer_are_refused():
    timer = Timer("mine")
    with pytest.raises(RequestError, match="'mine' is not running"):
        timer.stop()
    timer.start()
    with pytest.raises(RequestError, match="'mine' is running"):
        timer.start()
    timer.reset()
    timer.start()
    with pytest.raises(RequestError, match="mode is 'median'"):
        timer.elapsed("median")


def test_timers_are_known_by_name():
    group = Timers()
    assert "a" not in group
    group("a").costs.append(1.0)
    assert "a" in group and group("a").costs == [1.0] and group("b").costs == []


@pytest.mark.parametrize(
    ("costs", "gen_len", "seconds"),
    [
        ([9], 1, 0),
        ([9], 5, 0),
        ([9, 3], 1, 0),
        ([9, 3, 5], 3, 8),  # nothing to project
        ([9, 3, 5, 1, 3], 9, 3 + 5 + 6 * 2),  # the first two do not stand for those to come
        ([9, 3, 5], 5, 8 + 2 * 4),  # unless there are no others
        ([9, 3, 5, 1, 3], 3, 8),
    ],
)
def test_a_projected_decode(costs, gen_len, seconds):
    assert project_decode_latency(costs, 512, gen_len) == pytest.approx(seconds)


def test_a_call_is_timed(tiny, env, policy):
    model = OptLM(tiny.config, env, str(tiny.path), policy(num_gpu_batches=2))
    timer = timers("generate")
    timer.reset()
    free = model.generate(PROMPTS, 6)
    assert len(timer.costs) == 6, "the prefill and five later tokens"
    assert timer.costs[0] == model.stats.timing.prefill
    assert sum(timer.costs) == pytest.approx(model.stats.timing.total)
    lengths = []
    for options in (
        dict(cut_gen_len=3),  # the tokens that ran, which a script extrapolates
        dict(debug_mode="fewer_batch"),  # projected to all
        dict(debug_mode="breakdown"),
        dict(max_new_tokens=1),
    ):
        model.generate(PROMPTS, **dict(max_new_tokens=6) | options)
        lengths.append(len(timer.costs))
    assert lengths == [6 + 3, 6 + 3 + 6, 6 + 3 + 6 + 6, 6 + 3 + 6 + 6 + 1]
    stop = int(free[0, 3])
    timer.reset()
    model.generate(PROMPTS[:1], 6, stop=stop)
    assert len(timer.costs) == 1, "a run that ends early has no more tokens"
