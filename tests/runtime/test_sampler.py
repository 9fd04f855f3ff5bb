from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen.errors import RequestError
from flexgen.runtime.draws import uniforms
from flexgen.runtime.sampler import INVALID, draw, sample

DRAWS = 4000


def reference(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Probabilities (vocab,) in float64: temperature, then top-k, then top-p."""
    scaled = logits.astype(np.float64) / temperature
    kept = np.ones(len(scaled), dtype=bool)
    if 0 < top_k < len(scaled):
        kept &= scaled >= np.sort(scaled)[-top_k]
    weights = np.where(kept, np.exp(scaled - scaled.max()), 0.0)
    mass = weights / weights.sum()
    order = np.argsort(-mass, kind="stable")
    before = np.cumsum(mass[order]) - mass[order]
    stays = before < top_p
    stays[0] = True
    kept[order[~stays]] = False
    weights = np.where(kept, mass, 0.0)
    return weights / weights.sum()


CPU = torch.device("cpu")


def drawn_ids(logits: torch.Tensor, seed: int = 0, **options: Any) -> torch.Tensor:
    """Ids for one row of a job per row of logits."""
    return sample(logits, uniforms=uniforms(seed, range(len(logits)), 0, CPU), **options)


def frequencies(logits: np.ndarray, seed: int = 0, **options: Any) -> np.ndarray:
    """How often each token comes in many draws."""
    rows = torch.from_numpy(logits).float().expand(DRAWS, -1)
    ids = drawn_ids(rows, seed, **options)
    return np.bincount(ids.numpy(), minlength=len(logits)) / DRAWS


def assert_drawn_from(expected: np.ndarray, drawn: np.ndarray) -> None:
    assert not drawn[expected == 0].any(), "a token was drawn that a filter takes away"
    likely = expected > 20 / DRAWS  # missed by chance less than once in e**20
    assert drawn[likely].all(), "a token that stays was never drawn"
    deviation = np.sqrt(expected * np.clip(1 - expected, 0, 1) / DRAWS)
    assert (np.abs(drawn - expected) <= 8 * deviation + 4 / DRAWS).all()


def near_the_edge(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> bool:
    """Whether rounding decides if a token stays: the mass before one is all but equal to top_p."""
    if top_p == 1:
        return False
    mass = np.sort(reference(logits, temperature, top_k, 1.0))[::-1]
    return bool((np.abs(np.cumsum(mass) - mass - top_p) < 1e-4).any())


@settings(max_examples=150)
@given(
    # Few different values, so that ties at the k-th are common.
    levels=st.lists(st.integers(-6, 6), min_size=1, max_size=24),
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.9, 10.0]),
    top_k=st.integers(0, 30),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 1.0)),
    seed=st.integers(0, 99),
)
def test_draws_follow_the_rules(
    levels: list[int], temperature: float, top_k: int, top_p: float, seed: int
) -> None:
    logits = np.array(levels, dtype=np.float64) * 0.5
    expected = reference(logits, temperature, top_k, top_p)
    drawn = frequencies(logits, seed, temperature=temperature, top_k=top_k, top_p=top_p)
    if near_the_edge(logits, temperature, top_k, top_p):
        return
    # Among equal logits the cut of top-p may fall on any: compare what each value gets in all.
    values = np.unique(logits)
    by_value = [np.array([row[logits == value].sum() for value in values]) for row in (expected, drawn)]
    assert_drawn_from(*by_value)
    assert (drawn > 0).sum() <= (expected > 0).sum()


def test_random_logits_follow_the_reference() -> None:
    logits = np.random.default_rng(0).normal(size=50) * 2
    for options in (
        dict(temperature=1.0, top_k=0, top_p=1.0),
        dict(temperature=0.8, top_k=9, top_p=1.0),
        dict(temperature=1.5, top_k=0, top_p=0.7),
        dict(temperature=1.3, top_k=12, top_p=0.6),
    ):
        assert not near_the_edge(logits, **options)
        assert_drawn_from(reference(logits, **options), frequencies(logits, **options))


def test_temperature_zero_is_argmax_and_skips_the_filters() -> None:
    logits = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    assert sample(logits, 0.0, top_k=3, top_p=0.1).equal(logits.argmax(-1))
    logits[0, 5] = math.inf  # no softmax is taken
    assert sample(logits, 0)[0] == 5


def test_top_k_keeps_what_ties_with_the_kth() -> None:
    logits = np.array([3.0, 1.0, 2.0, 2.0, 2.0, 0.0])
    assert (frequencies(logits, top_k=2, temperature=5.0) > 0).tolist() == [
        True,
        False,
        True,
        True,
        True,
        False,
    ]
    assert (frequencies(logits, top_k=1, temperature=5.0) > 0).tolist() == [True] + [False] * 5


def test_top_p_counts_the_mass_strictly_before() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.125]))  # exact sums
    for top_p, count in ((0.01, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.88, 4), (1.0, 4)):
        assert (frequencies(logits, top_p=top_p) > 0).sum() == count, top_p


def test_top_p_looks_at_what_top_k_left() -> None:
    # All ids: 0.4 0.3 0.2 0.1. The best two: 0.571 0.429, so 0.5 keeps the best one only.
    logits = np.log(np.array([0.1, 0.4, 0.2, 0.3]))
    assert (frequencies(logits, top_p=0.5) > 0).tolist() == [False, True, False, True]
    assert (frequencies(logits, top_k=2, top_p=0.5) > 0).tolist() == [False, True, False, False]


def test_temperature_comes_before_top_p() -> None:
    logits = np.log(np.array([0.7, 0.2, 0.1]))
    assert (frequencies(logits, top_p=0.6) > 0).sum() == 1
    assert (frequencies(logits, top_p=0.6, temperature=4.0) > 0).sum() == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_id_for_each_row(dtype: torch.dtype) -> None:
    ids = drawn_ids(torch.randn(7, 11).to(dtype), temperature=1.0, top_k=5, top_p=0.9)
    assert ids.shape == (7,) and ids.dtype == torch.int64
    assert ((ids >= 0) & (ids < 11)).all()


def test_rows_are_filtered_each_on_its_own() -> None:
    logits = torch.eye(4).mul(3).expand(50, 4, 4).reshape(200, 4)
    assert drawn_ids(logits, temperature=2.0, top_k=1).equal(torch.arange(200) % 4)


def test_logits_are_not_written_to() -> None:
    logits = torch.randn(3, 9)
    before = logits.clone()
    drawn_ids(logits, temperature=0.7, top_k=4, top_p=0.5)
    assert logits.equal(before)


@pytest.mark.parametrize("options", [dict(temperature=0), dict(), dict(top_k=2), dict(top_p=0.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_that_are_no_numbers_get_no_id(options: dict[str, Any], dtype: torch.dtype) -> None:
    logits = torch.zeros(5, 5, dtype=dtype)
    logits[:, 2] = 60.0
    logits[1, 4] = math.nan
    logits[2, 3] = -math.inf  # a single id: it cannot be drawn
    logits[3, 4] = math.inf
    infinite = 4 if options.get("temperature") == 0 else INVALID
    assert drawn_ids(logits, **options).tolist() == [2, INVALID, 2, infinite, 2]


def test_a_draw_is_the_first_id_past_its_share() -> None:
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.25, 0.25, 0.0])
    below_one = 1 - 2.0**-53
    for share, id in ((0.0, 1), (0.4999, 1), (0.5, 3), (0.7499, 3), (0.75, 4), (below_one, 4)):
        assert draw(probabilities[None], torch.tensor([share], dtype=torch.float64)).tolist() == [id], share


@given(
    # Sums of float32 that miss 1, runs of zeros at both ends and in between.
    weights=st.lists(st.sampled_from([0.0, 0.0, 1e-30, 1e-7, 0.3, 1.0, 7.0]), min_size=1, max_size=300),
    share=st.one_of(st.just(0.0), st.just(1 - 2.0**-53), st.floats(0, 1, exclude_max=True)),
)
def test_an_id_of_probability_0_is_never_drawn(weights: list[float], share: float) -> None:
    given_weights = torch.tensor([weights + [0.01]])
    probabilities = given_weights / given_weights.sum()
    id = int(draw(probabilities, torch.tensor([share], dtype=torch.float64)))
    assert probabilities[0, id] > 1e-16


def test_a_row_does_not_depend_on_the_others() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    shares = uniforms(3, range(6), 0, CPU)
    options = dict(temperature=1.4, top_k=20, top_p=0.9)
    together = sample(logits, uniforms=shares, **options)
    apart = [sample(logits[[n]], uniforms=shares[[n]], **options) for n in range(6)]
    assert together.equal(torch.cat(apart))


@pytest.mark.parametrize("temperature", [1e-29, 1e-30, 1e-38, 1e-46, 5e-324, np.float64(1e-300)])
def test_a_temperature_near_0_takes_the_best(temperature: float) -> None:
    logits = torch.randn(20, 30, generator=torch.Generator().manual_seed(0)) * 100
    logits[:, 3] = -math.inf
    for top_p in (1.0, 0.9):
        assert drawn_ids(logits, temperature=temperature, top_p=top_p).equal(logits.argmax(-1))


def test_a_row_that_is_not_a_number_has_no_id() -> None:
    logits = torch.zeros(4, 5)
    logits[1, 2], logits[2, 4] = math.nan, math.inf
    logits[3] = -math.inf
    ids = drawn_ids(logits)
    assert (ids == INVALID).tolist() == [False, True, True, True]


def test_a_seed_repeats() -> None:
    logits = torch.zeros(100, 50)
    first, second, other = (drawn_ids(logits, seed) for seed in (1, 1, 2))
    assert first.equal(second) and not first.equal(other)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": "warm"}, "temperature is 'warm'"),
        ({"temperature": True}, "temperature is True"),
        ({"temperature": 10**400}, "temperature exceeds the range of a float"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 2.0}, "top_k is 2.0"),
        ({"top_k": True}, "top_k is True"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": -0.1}, "top_p is -0.1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_p": math.nan}, "top_p is nan"),
    ],
)
def test_errors(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError) as raised:
        drawn_ids(torch.zeros(1, 4), **options)
    assert words in str(raised.value)


def test_a_generator_of_torch_repeats_what_it_draws():
    logits = torch.zeros(64, 16)
    first, second, other = (sample(logits, generator=torch.Generator().manual_seed(n)) for n in (1, 1, 2))
    assert first.equal(second) and not first.equal(other)
