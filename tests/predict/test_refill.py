"""Predictions of blocks whose rows end early: their stages, by hand and compared with blocks of equal rows."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen import Policy
from flexgen.layout.passes import Passes
from flexgen.models import open_model
from flexgen.predict.prediction import predict
from flexgen.predict.refilled_passes import refilled_passes
from flexgen.results.report import Stage
from flexgen.workload import Workload

POLICY = Policy(gpu_batch_size=4, num_gpu_batches=4, weights={"cpu": 100})


@pytest.fixture(scope="module")
def opt(configs):
    return open_model(configs["opt"], "dummy")[0]


def test_passes_by_hand():
    """Batch 1 ends first, and the last two prompts enter there; then both rows of batch 0 end."""
    passes = list(refilled_passes([3, 3, 1, 1, 2, 4], Policy(gpu_batch_size=2, num_gpu_batches=2), Passes(5)))
    assert [one.tokens for one in passes] == [(0, 0), (1, 0), (2, 1), (2,), (3,)]
    assert [one.live for one in passes] == [4, 4, 4, 1, 1]
    assert [one.stage for one in passes] == [Stage.FILL, *[Stage.DRAIN] * 4]
    assert [one.entering for one in passes] == [2, 1, 0, 0, 0]
    assert [one.begins for one in passes] == [True, True, False, True, False]
    assert [one.cut for one in passes] == [True, False, True, False, False]
    assert [one.loaded for one in passes] == [False, True, False, True, False]


def test_prompts_that_begin_when_all_others_have_ended_load_all_weights():
    """The weights of their first pass are in other slots: runs begin again with its number."""
    passes = list(refilled_passes([2, 1, 3], Policy(), Passes(5)))
    assert [one.tokens for one in passes] == [(0,), (1,), (0,), (0,), (1,), (2,)]
    assert [one.cut for one in passes] == [False, True, True, False, False, False]
    assert not any(one.loaded for one in passes)


def test_passes_in_which_prompts_enter_at_a_rate_begin_and_end_runs():
    policy = Policy(gpu_batch_size=2, num_gpu_batches=2, prefill_rows=1, activations={"gpu": 100})
    passes = list(refilled_passes([3, 2, 4, 1, 2], policy, Passes(5, rows=1)))
    assert sum(one.live for one in passes) == 12
    assert [one.entering for one in passes[:4]] == [1] * 4 and not passes[-1].entering
    for before, one in pairwise(passes):
        assert not one.entering or (one.begins and one.cut)
        assert one.begins or not before.cut
        assert one.loaded == before.cut
        assert not (one.put_back or one.moved)


def test_attention_reads_only_the_cache_of_rows_that_get_a_token():
    """In a batch, the prompts of some places are not computed yet, and other rows have ended."""
    policy = Policy(gpu_batch_size=3, prefill_rows=1, activations={"gpu": 100})
    passes = list(refilled_passes([4, 2, 3], policy, Passes(5, rows=1)))
    decoding = [one for one in passes if max(one.tokens) > 0]
    assert [one.rows for one in decoding] == [(1, 3), (1, 3), (3,), (3,)]
    assert [one.attending for one in decoding] == [(1, 1), (1, 2), (2,), (1,)]
    assert [one.cached_tokens(5) for one in decoding] == [6, 2 * 7, 2 * 7, 7]


def test_rows_that_move_count_their_tokens():
    passes = list(refilled_passes([1, 4, 1, 4, 1, 1], Policy(gpu_batch_size=2, num_gpu_batches=2), Passes(5)))
    assert [one.rows for one in passes] == [(2, 2), (2, 2), (2,), (2,)]
    assert [one.moved for one in passes] == [0, 2 * 6, 0, 0]


@given(
    answers=st.lists(st.integers(1, 9), min_size=1, max_size=60),
    size=st.integers(1, 5),
    batches=st.integers(1, 5),
    chunk=st.integers(0, 6),
)
def test_every_token_has_a_pass(answers, size, batches, chunk):
    policy = Policy(gpu_batch_size=size, num_gpu_batches=batches)
    passes = list(refilled_passes(answers, policy, Passes(6, chunk)))
    assert sum(one.live for one in passes) == sum(answers)
    assert all(sum(one.rows) <= policy.block_size and len(one.rows) <= batches for one in passes)
    stages = [one.stage for one in passes]
    assert stages == sorted(stages, key=list(Stage).index)


@pytest.mark.parametrize("prompt_len", [16, 2_000])
def test_without_early_ends_a_job_takes_as_long_as_its_blocks(opt, machine, prompt_len):
    """Long prompts give the link time to load the first weights of the pass after them, but only of this one."""
    workload = Workload(prompt_len, 12, 64)
    blocks = predict(opt, POLICY, machine(), workload).report
    refilled = predict(opt, POLICY, machine(), replace(workload, mean_new=12)).report
    assert refilled.total_s == pytest.approx(blocks.total_s, rel=0.02)
    assert refilled.new_tokens == 64 * 12
    assert refilled.stages[Stage.STEADY].used == 1


def test_shorter_answers_take_less_time_and_blocks_take_more(opt, machine):
    whole = Workload(16, 32, 128)
    totals = [
        predict(opt, POLICY, machine(), replace(whole, mean_new=mean)).report.total_s
        for mean in (4, 8, 16, 32)
    ]
    assert totals == sorted(totals)
    refilled = predict(opt, POLICY, machine(), replace(whole, mean_new=8)).report
    block = predict(opt, POLICY, machine(), replace(whole, mean_new=8, num_prompts=16)).report
    assert 8 * block.total_s > 1.5 * refilled.total_s
    assert not block.stages
    assert sum(seconds for seconds, _ in refilled.stages.values()) == pytest.approx(refilled.total_s)


def test_jobs_of_many_prompts_repeat_the_steady_stage(opt, machine):
    policy = Policy(gpu_batch_size=2, num_gpu_batches=2, weights={"cpu": 100})
    job = Workload(16, 16, 64, mean_new=6)
    some, more, many = (
        predict(opt, policy, machine(), replace(job, num_prompts=n)).report for n in (64, 128, 256)
    )
    assert many.new_tokens == pytest.approx(256 * 6, rel=0.05)
    assert many.total_s - more.total_s == pytest.approx(2 * (more.total_s - some.total_s), rel=0.01)
    passes = list(refilled_passes(replace(job, num_prompts=256).answers(), policy, Passes(16)))
    each = np.mean(
        [
            many.total_s / len(passes),
            some.total_s / len(list(refilled_passes(job.answers(), policy, Passes(16)))),
        ]
    )
    assert many.total_s == pytest.approx(each * len(passes), rel=0.05)


def test_attention_on_the_host_slows_weights_that_arrive_while_prompts_enter(opt, machine):
    """As in a decode, though in a prefill, where the host only copies, it does not."""
    on_host = dict(cache={"cpu": 100}, attend_on="cpu", sep_layer=False)
    policy = POLICY.replace(prefill_rows=1, activations={"gpu": 100}, **on_host)
    pairs = "to_device host", "host to_device"

    def seconds(share):
        lost = dict(interference=dict.fromkeys(pairs, share), prefill_interference=dict.fromkeys(pairs, 0.0))
        report = predict(opt, policy, machine(**lost), Workload(16, 8, 64)).report
        return report.stages[Stage.STEADY].seconds

    assert seconds(0.5) > 1.01 * seconds(0.0)
