"""What `generate` takes and gives: kinds of input, stops, cuts, sampling, what it prints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flexgen.engine.model import OptLM
from flexgen.errors import RequestError
from flexgen.policy import Policy

PAD = 1
NAME = "llama gqa 2"


@pytest.fixture(scope="module")
def lm(tiny: Any, mixed: Any) -> Iterator[OptLM]:
    with OptLM(tiny(NAME).directory, mixed(), device="emulated", progress=False) as opened:
        yield opened


@pytest.fixture
def with_ends(tiny: Any, tmp_path: Path) -> Any:
    """`with_ends(5, [5, 7])`: the model's directory with these end ids in config and generation config."""

    def make(config: int | None, generation: int | list[int] | None) -> Path:
        directory = tmp_path / "model"
        shutil.copytree(tiny(NAME).directory, directory)
        for file, value in (("config.json", config), ("generation_config.json", generation)):
            fields = json.loads((directory / file).read_text()) | {"eos_token_id": value}
            (directory / file).write_text(json.dumps(fields))
        return directory

    return make


# Inputs and result


def test_result_holds_prompts_and_new_tokens(lm: OptLM, prompts: Any) -> None:
    given = prompts([5, 5])
    out = lm.generate(given, 4, stop=())
    assert out.shape == (2, 9) and out.dtype == np.int64
    assert out[:, :5].tolist() == given
    assert (out >= 0).all() and (out < lm.spec.vocab_size).all()


@pytest.mark.parametrize(
    "kind",
    [
        np.array,
        lambda rows: np.array(rows, dtype=np.int32),
        lambda rows: np.array(rows, dtype=np.uint8),
        torch.tensor,
        lambda rows: torch.tensor(rows, dtype=torch.int32),
        lambda rows: tuple(map(tuple, rows)),
        lambda rows: [np.array(row) for row in rows],
        lambda rows: [torch.tensor(row) for row in rows],
    ],
)
def test_kinds_of_input_are_equal(kind: Any, lm: OptLM, prompts: Any) -> None:
    given = prompts([6, 6, 6])
    np.testing.assert_array_equal(lm.generate(kind(given), 3, stop=()), lm.generate(given, 3, stop=()))


def test_inputs_are_not_written_to(lm: OptLM, prompts: Any) -> None:
    ids = torch.tensor(prompts([6, 6]))
    ids[0, :2] = PAD
    mask = (ids != PAD).long()
    before = ids.clone(), mask.clone()
    lm.generate(ids, 3, attention_mask=mask)
    assert torch.equal(ids, before[0]) and torch.equal(mask, before[1])


def test_ragged_lists_are_padded_on_the_left(lm: OptLM, prompts: Any, tiny: Any) -> None:
    given = prompts([2, 5, 3])
    out = lm.generate(given, 4, stop=())
    assert out.shape == (3, 9)
    assert out[:, :5].tolist() == [[PAD] * (5 - len(row)) + row for row in given]
    for row, prompt in zip(out, given, strict=True):  # padding changes nothing
        np.testing.assert_array_equal(row[5:], tiny(NAME).greedy([prompt], 4)[0, len(prompt) :])


def test_more_prompts_than_a_block(lm: OptLM, prompts: Any, tiny: Any) -> None:
    given = prompts([4, 6, 3, 5, 2, 7, 4, 3, 6, 5, 2, 4, 8])  # two blocks of 6 and one of 1
    out = lm.generate(given, 5, stop=())
    np.testing.assert_array_equal(out, tiny(NAME).greedy(given, 5))
    assert lm.stats is not None
    assert (lm.stats.num_prompts, lm.stats.prompt_tokens, lm.stats.new_tokens) == (13, 59, 65)


def test_attention_mask_frees_prompts_of_padding(lm: OptLM, prompts: Any) -> None:
    given = prompts([4, 6, 5])
    expected = lm.generate(given, 4, stop=())
    left = np.array([[9] * (6 - len(row)) + row for row in given])
    right = np.array([row + [9] * (6 - len(row)) for row in given])
    left_mask = np.array([[0] * (6 - len(row)) + [1] * len(row) for row in given])
    np.testing.assert_array_equal(lm.generate(left, 4, stop=(), attention_mask=left_mask), expected)
    right_mask = torch.from_numpy(left_mask[:, ::-1].copy()).bool()
    np.testing.assert_array_equal(lm.generate(right, 4, stop=(), attention_mask=right_mask), expected)


def test_leading_pad_ids_of_an_array_are_padding(lm: OptLM, prompts: Any) -> None:
    given = prompts([4, 6])
    padded = np.array([[PAD] * (6 - len(row)) + row for row in given])
    np.testing.assert_array_equal(lm.generate(padded, 4, stop=()), lm.generate(given, 4, stop=()))


def test_a_pad_id_elsewhere_or_marked_as_real_is_a_token(lm: OptLM, tiny: Any, prompts: Any) -> None:
    inside = prompts([6])
    inside[0][3] = PAD
    np.testing.assert_array_equal(lm.generate(inside, 3, stop=()), tiny(NAME).greedy(inside, 3))
    leading = [[PAD, *prompts([5])[0]]]
    real = lm.generate(leading, 3, stop=(), attention_mask=[[1] * 6])
    np.testing.assert_array_equal(real, tiny(NAME).greedy(leading, 3))


# Stops


def test_zero_is_a_stop_id(lm: OptLM, tiny: Any, prompts: Any) -> None:
    given = prompts([4] * 60)
    free = tiny(NAME).greedy(given, 12)[:, 4:]
    hits = [n for n, row in enumerate(free) if 0 in row[:-1]]
    assert hits, "no prompt leads to id 0"
    chosen = [given[n] for n in hits[:3]]
    out = lm.generate(chosen, 12, stop=0)
    np.testing.assert_array_equal(out, tiny(NAME).greedy(chosen, 12, [0]))
    assert (out[:, -1] == PAD).all()


def test_any_of_several_stops_ends_a_row(lm: OptLM, tiny: Any, prompts: Any) -> None:
    given = prompts([4, 4, 4])
    free = tiny(NAME).greedy(given, 8)[:, 4:]
    stops = [int(free[0, 1]), int(free[1, 3])]
    expected = tiny(NAME).greedy(given, 8, stops)
    for several in (stops, tuple(stops), set(stops), np.array(stops), iter(stops)):
        np.testing.assert_array_equal(lm.generate(given, 8, stop=several), expected)
    np.testing.assert_array_equal(lm.generate(given, 8, stop=np.int64(stops[0]))[0, 6:], [PAD] * 6)


@pytest.mark.parametrize("place", ["config", "generation_config", "several"])
def test_without_stop_the_model_s_end_ids_count(
    place: str, with_ends: Any, tiny: Any, mixed: Any, prompts: Any
) -> None:
    given = prompts([4, 5, 6])
    free = tiny(NAME).greedy(given, 8)
    end, other = int(free[0, 8]), int(free[1, 9])
    config, generation, ends = {
        "config": (end, None, [end]),
        "generation_config": (other, end, [end]),
        "several": (None, [end, other], [end, other]),
    }[place]
    expected = tiny(NAME).greedy(given, 8, ends)
    assert (expected != free).any(), "the end id must occur"
    with OptLM(with_ends(config, generation), mixed(), device="cpu", progress=False) as lm:
        np.testing.assert_array_equal(lm.generate(given, 8), expected)
        np.testing.assert_array_equal(lm.generate(given, 8, stop=None), expected)
        np.testing.assert_array_equal(lm.generate(given, 8, stop=()), free)
        np.testing.assert_array_equal(lm.generate(given, 8, stop=[]), free)


# Lengths and reports


def test_one_new_token(lm: OptLM, tiny: Any, prompts: Any) -> None:
    given = prompts([4, 7])
    np.testing.assert_array_equal(lm.generate(given, 1, stop=()), tiny(NAME).greedy(given, 1))
    assert lm.stats is not None and lm.stats.new_tokens == 2


@pytest.mark.parametrize(("cut", "made"), [(1, 1), (3, 3), (6, 6), (9, 6)])
def test_cut_gen_len_leaves_the_rest_padded(cut: int, made: int, lm: OptLM, prompts: Any) -> None:
    given = prompts([4, 4])
    out = lm.generate(given, 6, stop=(), cut_gen_len=cut)
    whole = lm.generate(given, 6, stop=())
    assert out.shape == whole.shape
    np.testing.assert_array_equal(out[:, : 4 + made], whole[:, : 4 + made])
    assert (out[:, 4 + made :] == PAD).all()


def test_fewer_batch_projects_from_a_few_tokens(lm: OptLM, prompts: Any, capsys: Any) -> None:
    given = prompts([4, 4])
    out = lm.generate(given, 12, stop=(), debug_mode="fewer_batch")
    printed = capsys.readouterr()
    assert "projected from 4 tokens" in printed.err and not printed.out
    np.testing.assert_array_equal(out[:, :8], lm.generate(given, 4, stop=()))
    assert (out[:, 8:] == PAD).all()


def test_breakdown_prints_every_operation(lm: OptLM, prompts: Any, capsys: Any) -> None:
    out = lm.generate(prompts([4] * 6), 3, stop=(), debug_mode="breakdown")
    printed = capsys.readouterr().err
    for operation in (
        "load_weights", "load_cache", "load_hidden", "compute", "store_hidden", "store_cache"
    ):  # fmt: skip
        assert operation in printed
    assert lm.stats is not None and lm.stats.order == "normal"
    np.testing.assert_array_equal(out, lm.generate(prompts([4] * 6), 3, stop=()))
    assert lm.stats.order != "normal", "only the breakdown runs without overlap"


def test_breakdown_runs_a_few_tokens(lm: OptLM, prompts: Any, capsys: Any) -> None:
    out = lm.generate(prompts([4, 4]), 12, stop=(), debug_mode="breakdown")
    assert "projected from 4 tokens" in capsys.readouterr().err
    assert (out[:, 8:] == PAD).all() and lm.stats is not None and lm.stats.new_tokens == 8


def test_verbose_prints_one_summary(lm: OptLM, prompts: Any, capsys: Any) -> None:
    lm.generate(prompts([4, 5]), 3, stop=(), verbose=1)
    (line,) = capsys.readouterr().err.splitlines()
    assert "2 prompts, 6 new tokens" in line and "prefill" in line and "decode" in line


def test_silent_by_default(lm: OptLM, prompts: Any, capsys: Any) -> None:
    lm.generate(prompts([4, 5]), 3, stop=())
    assert capsys.readouterr() == ("", "")


def test_progress_bar_counts_tokens(tiny: Any, mixed: Any, prompts: Any, capsys: Any) -> None:
    with OptLM(tiny(NAME).directory, mixed(), device="cpu", progress=True) as lm:
        assert "weights: 100%" in capsys.readouterr().err
        lm.generate(prompts([4, 5]), 3, stop=())
    assert "tokens:" in capsys.readouterr().err


def test_stats_describe_the_call(lm: OptLM, prompts: Any) -> None:
    lm.generate(prompts([4, 5]), 3, stop=())
    stats = lm.stats
    assert stats is not None
    assert (stats.num_prompts, stats.prompt_tokens, stats.new_tokens) == (2, 9, 6)
    assert stats.positions_computed == 10 and stats.padded_share == pytest.approx(0.1)
    assert 0 < stats.timing.prefill <= stats.timing.total
    for tier, nbytes in stats.plan.by_tier.items():
        assert nbytes > 0 and stats.peak_bytes[tier] >= 0
    assert {event.step.layer for event in stats.timing.trace.events} == set(range(len(lm.layer_names)))


def test_padded_share_counts_the_padding_of_each_batch(lm: OptLM, prompts: Any) -> None:
    """Batches of 3, longest first: 9 8 7 | 6 5 4, then in a block of its own 3 2."""
    given = prompts([3, 7, 5, 9, 2, 6, 4, 8])
    for call in (lambda: lm.generate(given, 3, stop=()), lambda: lm.forward(given)):
        call()
        assert lm.stats is not None
        assert lm.stats.positions_computed == 3 * 9 + 3 * 6 + 2 * 3
        assert lm.stats.padded_share == pytest.approx(1 - 44 / 51)
    lm.generate(prompts([4] * 7), 3, stop=())
    assert lm.stats is not None and lm.stats.padded_share == 0.0


# Sampling


def draw(lm: OptLM, given: Any, **options: Any) -> np.ndarray:
    return lm.generate(given, 6, do_sample=True, stop=(), **options)


def test_a_seed_repeats_and_another_differs(lm: OptLM, prompts: Any) -> None:
    given = prompts([4] * 8)
    first = draw(lm, given, temperature=2.0, seed=7)
    np.testing.assert_array_equal(first, draw(lm, given, temperature=2.0, seed=7))
    assert (first != draw(lm, given, temperature=2.0, seed=8)).any()
    assert (draw(lm, given, temperature=2.0) != draw(lm, given, temperature=2.0)).any()


HOW = {
    "another batch shape": dict(policy=Policy(gpu_batch_size=3, num_gpu_batches=1)),
    "one batch": dict(policy=Policy(gpu_batch_size=16)),
    "offloaded": dict(
        policy=Policy(
            gpu_batch_size=2,
            num_gpu_batches=2,
            weights={"cpu": 100},
            cache={"disk": 100},
            activations={"cpu": 100},
        ),
        device="emulated",
    ),
    "another order": dict(policy=Policy(gpu_batch_size=2, num_gpu_batches=2), order="normal"),
}


@pytest.mark.parametrize("how", HOW)
def test_the_same_seed_draws_the_same_under_every_policy(
    how: str, tiny: Any, mixed: Any, prompts: Any
) -> None:
    given = prompts([4, 7, 3, 9, 5, 4, 8])
    made = []
    for options in (dict(policy=mixed()), HOW[how]):
        options = dict(device="cpu", dtype="float32", progress=False) | options
        with OptLM(tiny(NAME).directory, **options) as lm:
            made.append(lm.generate(given, 10, do_sample=True, temperature=1.5, top_p=0.95, seed=5))
    np.testing.assert_array_equal(*made)


def test_a_row_draws_the_same_whatever_call_it_is_in(lm: OptLM, prompts: Any) -> None:
    given = prompts([4] * 7)
    whole = draw(lm, given, temperature=2.0, seed=5)
    parts = [draw(lm, given[n : n + 3], temperature=2.0, seed=5, first_row=n) for n in (0, 3, 6)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    sampling = dict(do_sample=True, stop=(), temperature=2.0, seed=5)
    streamed = dict(lm.stream(given[3:], 6, first_row=3, **sampling))
    for row, ids in streamed.items():
        assert ids.tolist() == whole[3 + row, 4:].tolist()
    # Rows that end early, and leave their batch, change nothing in the others.
    stopped = lm.generate(given, 6, **sampling | dict(stop=int(whole[0, 5]), seed=5))
    for row, ids in enumerate(stopped[:, 4:].tolist()):
        until = ids.index(whole[0, 5]) + 1 if whole[0, 5] in ids else 6
        assert ids[:until] == whole[row, 4 : 4 + until].tolist()


def test_equal_prompts_draw_each_for_itself(lm: OptLM, prompts: Any) -> None:
    made = draw(lm, prompts([4]) * 8, temperature=2.0, seed=5)
    assert len({tuple(row) for row in made.tolist()}) == 8


def test_sampling_leaves_torch_s_own_generator_alone(lm: OptLM, prompts: Any) -> None:
    state = torch.get_rng_state()
    draw(lm, prompts([4] * 3), seed=1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("options", [{"top_k": 1}, {"temperature": 0.0, "top_k": 3}, {"top_p": 1e-9}])
def test_sampling_that_leaves_one_choice_is_greedy(options: Any, lm: OptLM, prompts: Any) -> None:
    given = prompts([4, 6, 3])
    np.testing.assert_array_equal(draw(lm, given, **options), lm.generate(given, 6, stop=()))


def test_temperature_counts_only_when_sampling(lm: OptLM, prompts: Any) -> None:
    given = prompts([4, 6])
    expected = lm.generate(given, 6, stop=())
    np.testing.assert_array_equal(lm.generate(given, 6, stop=(), temperature=9.0, seed=3), expected)


# The end


def test_a_closed_model_says_so(tiny: Any, mixed: Any, prompts: Any) -> None:
    lm = OptLM(tiny(NAME).directory, mixed(), device="cpu", progress=False)
    lm.close()
    lm.close()
    for use in (lambda: lm.generate(prompts([3])), lambda: lm.forward(prompts([3]))):
        with pytest.raises(RequestError, match="closed"):
            use()
