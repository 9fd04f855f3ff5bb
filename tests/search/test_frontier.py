"""The frontier of latency and throughput."""

import importlib.util

import pytest

from flexgen.errors import CapacityError, RequestError
from flexgen.models import open_model
from flexgen.policy import Auto, Policy
from flexgen.search.find import find_policy
from flexgen.search.frontier import Point, draw, find_frontier, frontier_table, not_dominated, plotter
from flexgen.workload import Workload


def point(prompts, seconds, tokens_s):
    return Point(prompts, seconds, tokens_s, Policy(weights={"cpu": 60, "disk": 40}))


def test_only_what_nothing_beats_in_both_stays():
    points = [point(1, 1.0, 10), point(2, 2.0, 9), point(4, 2.5, 30), point(8, 9.0, 30), point(3, 1.0, 12)]
    assert [(p.prompts, p.seconds) for p in not_dominated(points)] == [(3, 1.0), (4, 2.5)]


def test_more_prompts_give_more_and_take_longer(configs, machine):
    spec, _ = open_model(configs["opt"], "dummy")
    asked = []

    def find(workload):
        asked.append(workload)
        return find_policy(spec, machine(), workload, Auto({"weights": {"cpu": 100}}))

    points = find_frontier(find, Workload(8, 4, 6))
    assert [workload.num_prompts for workload in asked] == [1, 2, 4, 6]
    assert len(points) > 1
    for before, after in zip(points, points[1:], strict=False):
        assert before.seconds < after.seconds and before.tokens_s < after.tokens_s
    table = frontier_table(points).splitlines()
    assert len(table) == 1 + len(points) and "cpu 100%" in table[-1]


def test_it_ends_where_nothing_fits():
    def find(workload):
        raise CapacityError("too much")

    assert find_frontier(find, Workload(8, 4, 64)) == []


def test_it_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    draw(plotter(), [point(1, 1.0, 10), point(4, 2.5, 30)], tmp_path / "frontier.png", "a title")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"pip install 'flexgen\[plot\]'"):
        plotter()
