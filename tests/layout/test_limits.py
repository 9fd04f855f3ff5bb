"""`max_memory`, read before anything is opened."""

import pytest

from flexgen.engine.model import OptLM
from flexgen.errors import RequestError
from flexgen.layout.limits import read_limits
from flexgen.policy import Tier


def test_sizes_and_texts_by_tier():
    assert read_limits({"gpu": "2KiB", Tier.CPU: 5}) == {Tier.GPU: 2048, Tier.CPU: 5}
    assert read_limits(None) == read_limits({}) == {}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"vram": 5}, "'vram'; keys must be gpu, cpu, disk"),
        ({0: 5}, "the key 0"),
        ({"gpu": None}, "max_memory\\['gpu'\\]: None is not a size"),
        ({"cpu": float("nan")}, "nan is not a size"),
        ({"cpu": float("inf")}, "inf is not a size"),
        ({"disk": 10**400}, "is not a size"),
        ({"disk": [5]}, "is not a size"),
        (5, "max_memory is 5"),
        ("10GiB", "max_memory is '10GiB'"),
    ],
)
def test_other_limits_are_refused_on_opening(given, words):
    with pytest.raises(RequestError, match=words):
        OptLM("demo", max_memory=given)
