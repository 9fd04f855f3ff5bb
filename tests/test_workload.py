import dataclasses

import numpy as np
import pytest

from flexgen.errors import RequestError
from flexgen.workload import Workload


def test_capacity_is_prompt_and_generated_tokens():
    assert Workload(prompt_len=512, gen_len=32, num_prompts=64).capacity == 544


def test_a_prefix_is_shorter_than_the_prompts():
    assert Workload(8, 1, 3, prefix=7).prefix == 7 and Workload(8, 1, 3).prefix == 0
    with pytest.raises(RequestError, match="prefix is 8, but the prompts have 8 tokens"):
        Workload(8, 1, 3, prefix=8)
    with pytest.raises(RequestError, match="prefix is -1; it must be at least 0"):
        Workload(8, 1, 3, prefix=-1)


@pytest.mark.parametrize("cuts", [(0,), (5, 5), (6, 5), (7,), (9,)])
def test_cuts_divide_the_prefix(cuts):
    assert Workload(8, 1, 3, prefix=7, cuts=[2, 6]).cuts == (2, 6)
    with pytest.raises(RequestError, match=r"cuts are .*they must increase from 1 to 6"):
        Workload(8, 1, 3, prefix=7, cuts=cuts)


def test_groups_have_equally_many_prompts():
    assert Workload(8, 1, 7).group_sizes == [7]
    assert Workload(8, 1, 7, groups=3).group_sizes == [3, 2, 2]
    assert Workload(8, 1, 3, groups=3).group_sizes == [1, 1, 1]
    with pytest.raises(RequestError, match="groups is 4, but there are 3 prompts"):
        Workload(8, 1, 3, groups=4)
    with pytest.raises(RequestError, match="groups is 0; it must be at least 1"):
        Workload(8, 1, 3, groups=0)


@pytest.mark.parametrize("copied", [0.9, -1, float("nan"), float("inf"), True, "2", None])
def test_tokens_in_a_pass_are_a_number_of_at_least_1(copied):
    with pytest.raises(RequestError, match="copied is .*; it must be a finite number of at least 1"):
        Workload(8, 1, 3, copied=copied)


def test_a_pass_keeps_at_most_all_guesses():
    workload = Workload(8, 1, 3, copied=3)
    assert workload.copied == 3.0 and Workload(8, 1, 3).copied == 1.0
    assert [workload.tokens_in_pass(guess) for guess in (0, 1, 4)] == [1, 2, 3]


@pytest.mark.parametrize("mean_new", [None, 20])
@pytest.mark.parametrize(("guess", "copied"), [(0, 2.0), (1, 1.6), (4, 2.6), (4, 1.0), (4, 5.0), (2, 9.0)])
def test_passes_with_guesses(guess, copied, mean_new):
    job = Workload(8, 48, 64, mean_new=mean_new, copied=copied)
    later = [new - 1 for new in job.answers()]
    passes = [count - 1 for count in job.passes(guess)]
    fewest = [-(-new // (1 + guess)) for new in later]
    assert all(few <= count <= new for few, count, new in zip(fewest, passes, later, strict=True))
    expected = max(sum(later) / job.tokens_in_pass(guess), sum(fewest))
    assert sum(passes) == pytest.approx(expected, rel=0.02)
    assert passes == [count - 1 for count in job.passes(guess)]


def test_numpy_integers_become_plain_ones():
    workload = Workload(np.int64(3), np.int32(2), np.int64(1), mean_new=np.float32(1.5))
    assert workload == Workload(3, 2, 1, mean_new=1.5)
    sizes = workload.prompt_len, workload.gen_len, workload.num_prompts, workload.prefix
    assert all(type(value) is int for value in sizes) and type(workload.mean_new) is float


def test_answers_have_the_mean_and_end_with_the_longest():
    assert Workload(8, 5, 3).answers() == [5] * 3 == Workload(8, 5, 3, mean_new=5).answers()
    assert Workload(8, 5, 3, mean_new=1).answers() == [1] * 3
    for mean in (1.5, 13, 40, 63):
        answers = Workload(8, 64, 1000, mean_new=mean).answers()
        assert np.mean(answers) == pytest.approx(mean, rel=0.02)
        assert min(answers) >= 1 and max(answers) <= 64
        assert answers != sorted(answers), "short and long ones are mixed"
        assert answers == Workload(8, 64, 1000, mean_new=mean).answers()


@pytest.mark.parametrize(
    ("mean", "said"),
    [
        (0.5, "mean_new is 0.5; it must be a number from 1 to gen_len, which is 5"),
        (6, "mean_new is 6; it must be a number from 1 to gen_len"),
        (float("nan"), "mean_new is nan; it must be a number from 1"),
        ("3", "mean_new is '3'; it must be a number"),
        (True, "mean_new is True; it must be a number"),
    ],
)
def test_a_mean_beyond_the_new_tokens_is_refused(mean, said):
    with pytest.raises(RequestError, match=said):
        Workload(8, 5, 3, mean_new=mean)


def test_workload_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Workload(1, 1, 1).gen_len = 2


@pytest.mark.parametrize("name", ["prompt_len", "gen_len", "num_prompts"])
@pytest.mark.parametrize(
    ("value", "message"),
    [(0, "at least 1"), (-2, "-2"), (1.0, "float"), (True, "bool"), ("8", "str"), (None, "None")],
)
def test_sizes_are_whole_and_positive(name, value, message):
    sizes = {"prompt_len": 1, "gen_len": 1, "num_prompts": 1, name: value}
    with pytest.raises(RequestError, match=f"{name} is .*{message}"):
        Workload(**sizes)
