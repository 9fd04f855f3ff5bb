"""Policies: every field is checked, TOML round trips without loss, rows are divided exactly."""

import copy
import json
import math
import pickle

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flexgen.errors import PolicyError
from flexgen.policy import Policy, Share, Split, Tier
from flexgen.units import LARGEST_COUNT

ISSUE_TOML = """
gpu_batch_size = 48
num_gpu_batches = 3
weights     = { gpu = 20, cpu = { percent = 50, codec = "none" }, disk = 30 }
cache       = { cpu = 100 }
activations = { gpu = 50, cpu = 50 }
attend_on   = "gpu"
overlap     = false
sep_layer   = false
pin_weight  = false
"""


@st.composite
def splits(draw):
    gpu = draw(st.floats(0, 100))
    cpu = draw(st.floats(0, 100 - gpu))
    return Split(gpu, cpu, max(0.0, 100 - gpu - cpu))


policies = st.builds(
    Policy,
    gpu_batch_size=st.integers(1, LARGEST_COUNT),
    num_gpu_batches=st.integers(1, 1000),
    weights=splits(),
    cache=splits(),
    activations=splits(),
    attend_on=st.sampled_from(["cpu", "gpu"]),
    attn_sparsity=st.floats(0, 1, exclude_min=True),
    overlap=st.booleans(),
    sep_layer=st.booleans(),
    pin_weight=st.booleans(),
    share_prefix=st.booleans(),
)


def test_defaults_keep_everything_on_the_gpu():
    policy = Policy()
    assert policy.block_size == 1
    assert policy.weights == policy.cache == policy.activations == Split(gpu=Share(100))
    assert (policy.attend_on, policy.overlap, policy.sep_layer, policy.pin_weight) == (
        "cpu",
        True,
        True,
        True,
    )


def test_attention_is_exact_unless_asked_otherwise():
    assert Policy().attn_sparsity == 1.0 and type(Policy(attn_sparsity=1).attn_sparsity) is float
    assert Policy(attn_sparsity=np.float32(0.25)).attn_sparsity == 0.25


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (0, "attn_sparsity is 0; it must be above 0 and at most 1; write 0.1 for a tenth"),
        (-0.5, "attn_sparsity is -0.5"),
        (10, "attn_sparsity is 10; it must be above 0 and at most 1"),
        (math.nan, "attn_sparsity is nan"),
        (True, r"attn_sparsity is True \(bool\); it must be a number"),
        ("0.1", r"attn_sparsity is '0.1' \(str\)"),
    ],
)
def test_a_share_of_the_values_is_above_0_and_at_most_1(given, message):
    with pytest.raises(PolicyError, match=message):
        Policy(attn_sparsity=given)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(guess=-1), "guess is -1; it must be at least 0"),
        (dict(guess=1.5), r"guess is 1.5 \(float\); it must be a whole number >= 0"),
        (dict(guess=True), r"guess is True \(bool\)"),
        (dict(guess=4, attn_sparsity=0.5), "guess is 4 with attn_sparsity = 0.5, .*set guess to 0 or change"),
        (
            dict(guess=4, cache={"cpu": 90, "disk": 10}),
            "guess is 4 with 10 percent of the cache on disk, .*set guess to 0 or change the other one",
        ),
    ],
)
def test_guesses_that_do_not_work(fields, message):
    with pytest.raises(PolicyError, match=message):
        Policy(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(reserve_new=-1), "reserve_new is -1; it must be at least 0"),
        (dict(reserve_new=1.5), r"reserve_new is 1.5 \(float\); it must be a whole number >= 0"),
        (dict(reserve_new=True), r"reserve_new is True \(bool\)"),
        (
            dict(reserve_new=4, attn_sparsity=0.5),
            "reserve_new is 4 with attn_sparsity = 0.5, .*set reserve_new to 0 or change the other one",
        ),
        (dict(reserve_new=4, guess=2), "reserve_new is 4 with guess = 2, .*set reserve_new to 0 or change"),
    ],
)
def test_reserves_that_do_not_work(fields, message):
    with pytest.raises(PolicyError, match=message):
        Policy(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(prefill_rows=-1), "prefill_rows is -1; it must be at least 0"),
        (dict(prefill_rows=2.0), r"prefill_rows is 2.0 \(float\); it must be a whole number >= 0"),
        (
            dict(prefill_rows=2, cache={"cpu": 90, "disk": 10}),
            "prefill_rows is 2 with 10 percent of the cache on disk, .*set prefill_rows to 0 or change the other",
        ),
        (
            dict(prefill_rows=2, activations={"cpu": 60, "gpu": 40}),
            "with 40 percent of the activations on gpu, but",
        ),
        (dict(prefill_rows=2, guess=4), "prefill_rows is 2 with guess = 4, which starts with all rows"),
    ],
)
def test_entries_that_do_not_work(fields, message):
    with pytest.raises(PolicyError, match=message):
        Policy(**fields)


def test_a_policy_reserves_less_only_for_longer_answers():
    assert not Policy().reserves(100)
    policy = Policy(reserve_new=20)
    assert policy.reserves(21) and not policy.reserves(20) and not policy.reserves(1)


def test_guesses_are_off_by_default_and_saved(tmp_path):
    assert Policy().guess == 0
    policy = Policy(guess=4, cache={"cpu": 100}, weights={"disk": 100})
    policy.save(tmp_path / "policy.toml")
    assert Policy.load(tmp_path / "policy.toml") == policy


def test_short_and_full_forms_mean_the_same():
    short = Policy(weights={"gpu": 20, "cpu": {"percent": 80, "codec": "none"}})
    full = Policy(weights=Split(gpu=Share(20), cpu=Share(80), disk=Share(0)))
    assert short == full
    assert hash(short) == hash(full)
    assert short.weights[Tier.CPU] == short.weights["cpu"] == Share(80.0)
    assert short.weights.percent("gpu") == 20


def test_numpy_numbers_are_numbers():
    policy = Policy(gpu_batch_size=np.int64(4), weights={"gpu": np.float32(25), "cpu": np.int32(75)})
    assert policy == Policy(gpu_batch_size=4, weights={"gpu": 25, "cpu": 75})
    assert type(policy.gpu_batch_size) is int and type(policy.weights.gpu.percent) is float


def test_policy_cannot_be_changed_in_place():
    with pytest.raises(AttributeError):
        Policy().weights = {"cpu": 100}
    with pytest.raises(AttributeError):
        Policy().gpu_batch_size = 2


def test_replace_changes_and_validates():
    policy = Policy(gpu_batch_size=4, num_gpu_batches=2)
    assert policy.block_size == 8
    assert policy.replace(num_gpu_batches=5, cache={"disk": 100}) == Policy(
        gpu_batch_size=4, num_gpu_batches=5, cache={"disk": 100}
    )
    with pytest.raises(PolicyError, match="did you mean 'overlap'"):
        policy.replace(overlp=True)
    with pytest.raises(PolicyError, match="at least 1"):
        policy.replace(gpu_batch_size=0)


def test_load_reads_the_documented_form(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text(ISSUE_TOML)
    assert Policy.load(path) == Policy(
        gpu_batch_size=48,
        num_gpu_batches=3,
        weights=Split(20, 50, 30),
        cache={"cpu": 100},
        activations={"gpu": 50, "cpu": 50},
        attend_on="gpu",
        overlap=False,
        sep_layer=False,
        pin_weight=False,
    )


def test_saved_file_is_readable(tmp_path):
    path = tmp_path / "policy.toml"
    policy = Policy(gpu_batch_size=48, weights={"gpu": 20, "cpu": 50.5, "disk": 29.5})
    policy.save(path, comment="from a search\n\non one GPU")
    lines = path.read_text().splitlines()
    assert lines[:4] == ["# from a search", "#", "# on one GPU", "gpu_batch_size  = 48"]
    assert "weights         = { gpu = 20, cpu = 50.5, disk = 29.5 }" in lines
    assert "overlap         = true" in lines


@given(policy=policies, comment=st.text())
def test_save_and_load_lose_nothing(tmp_path_factory, policy, comment):
    path = tmp_path_factory.getbasetemp() / "round-trip.toml"
    policy.save(path, comment)
    assert Policy.load(path) == policy
    assert Policy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy


def test_from_percent_puts_the_rest_on_disk():
    policy = Policy.from_percent(20, 50, 0, 100, 33.3, 66.7, gpu_batch_size=8)
    assert policy == Policy(
        gpu_batch_size=8,
        weights={"gpu": 20, "cpu": 50, "disk": 30},
        cache={"cpu": 100},
        activations={"gpu": 33.3, "cpu": 66.7},
    )
    assert policy.activations.percent("disk") == 0  # not 7e-15


@given(split=splits(), count=st.integers(0, 1 << 50))
def test_rows_are_contiguous_exact_and_within_one_of_their_part(split, count):
    rows = split.rows(count)
    assert list(rows) == [Tier.GPU, Tier.CPU, Tier.DISK]
    assert rows[Tier.GPU].start == 0
    assert rows[Tier.GPU].stop == rows[Tier.CPU].start
    assert rows[Tier.CPU].stop == rows[Tier.DISK].start
    assert rows[Tier.DISK].stop == count
    for tier, part in rows.items():
        exact = count * split.percent(tier) / 100
        assert abs(len(part) - exact) < 1 + 1e-7 * count
        assert split.percent(tier) > 0 or len(part) == 0


@pytest.mark.parametrize(
    ("split", "count", "lengths"),
    [
        (Split(100), 7, (7, 0, 0)),
        (Split(20, 50, 30), 10, (2, 5, 3)),
        (Split(50, 50), 3, (2, 1, 0)),
        (Split(33.4, 33.3, 33.3), 1, (1, 0, 0)),
        (Split(0, 29, 71), 100, (0, 29, 71)),
        (Split(10, 10, 80), 2, (0, 0, 2)),
        (Split(20, 50, 30), 0, (0, 0, 0)),
    ],
)
def test_rows_of_a_split(split, count, lengths):
    assert tuple(len(part) for part in split.rows(count).values()) == lengths


@given(split=splits(), count=st.integers(0, 200))
@example(split=Split(43, 43, 14), count=3)  # by largest remainder the third tier has a row of 3 and none of 4
def test_fewer_rows_never_take_more_of_a_tier(split, count):
    fewer, more = split.rows(count), split.rows(count + 1)
    assert all(len(fewer[tier]) <= len(more[tier]) for tier in Tier)


def test_rows_refuse_a_negative_count():
    with pytest.raises(ValueError, match="-1"):
        Split(100).rows(-1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": {"gpu": 20, "cpu": 50}}, r"weights: gpu 20 \+ cpu 50 \+ disk 0 is 70 percent.*add 30"),
        ({"cache": {"gpu": 60, "disk": 50}}, "cache: .* is 110 percent; the sum must be 100: take 10"),
        ({"cache": {}}, "cache: .* is 0 percent"),
        ({"weights": {"gpu": 100.00001}}, "outside 0 to 100"),
        ({"weights": {"gpu": 99.999}}, "add 0.001"),
        ({"weights": {"gpu": -5, "cpu": 105}}, "weights: gpu: -5 percent is outside 0 to 100"),
        ({"weights": {"gpu": math.nan, "cpu": 100}}, "gpu: nan percent is outside"),
        ({"weights": {"gpu": math.inf}}, "inf percent is outside"),
        ({"weights": {"gpu": True, "cpu": 99}}, r"gpu: True \(bool\) is not a percentage"),
        ({"weights": {"gpu": "100"}}, r"'100' \(str\) is not a percentage"),
        ({"weights": 100}, r"weights: 100 \(int\) is not a split"),
        ({"weights": {"gpu": 50, "dsk": 50}}, "weights: unknown key 'dsk'.*did you mean 'disk'"),
        ({"weights": {"gpu": {"percent": 100, "codek": "none"}}}, "gpu: unknown key 'codek'.*'codec'"),
        ({"weights": {"gpu": {"codec": "none"}}}, "gpu: .* has no percent"),
        ({"weights": {"gpu": {"percent": 100, "codec": "nine"}}}, "codec 'nine' is not known.*'none'"),
        ({"weights": {"gpu": {"percent": 100, "codec": 4}}}, "codec 4 is not known"),
        ({"gpu_batch_size": 0}, "gpu_batch_size is 0; it must be at least 1"),
        ({"num_gpu_batches": -3}, "num_gpu_batches is -3"),
        ({"gpu_batch_size": True}, r"gpu_batch_size is True \(bool\)"),
        ({"gpu_batch_size": 1.5}, r"gpu_batch_size is 1.5 \(float\)"),
        ({"attend_on": "disk"}, "attend_on is 'disk'; it must be"),
        ({"attend_on": 1}, "attend_on is 1"),
        ({"overlap": 1}, r"overlap is 1 \(int\); it must be true or false"),
        ({"sep_layer": "yes"}, "sep_layer is 'yes'"),
        ({"gpu_batchsize": 4}, "unknown key 'gpu_batchsize'.*did you mean 'gpu_batch_size'"),
        ({"zzz": 4}, "unknown key 'zzz'; known: gpu_batch_size, .*reserve_new$"),
    ],
)
def test_invalid_values_are_refused(fields, message):
    with pytest.raises(PolicyError, match=message):
        Policy.from_dict(fields)


def test_sums_within_tolerance_are_accepted():
    split = Split(100 / 3, 100 / 3, 100 / 3)
    assert sum(len(part) for part in split.rows(100).values()) == 100


@pytest.mark.parametrize(
    ("percents", "message"),
    [
        ((60, 50, 0, 0, 0, 0), r"weights: gpu 60 \+ cpu 50 is 110 percent"),
        ((0, 0, math.nan, 0, 0, 0), "cache: nan percent"),
        ((0, 0, 0, 0, "0", 0), "activations: '0'"),
        ((0, 0, 0, 0, 0, -1), "activations: -1 percent"),
    ],
)
def test_from_percent_names_the_wrong_pair(percents, message):
    with pytest.raises(PolicyError, match=message):
        Policy.from_percent(*percents)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"gpu_batch_size =\n", "not valid TOML.*line 1.*; correct the file"),
        (b"\xff\xfe", "not valid TOML"),
        (b"overlp = true", "did you mean 'overlap'"),
        (b"weights = { gpu = nan }", "nan percent"),
    ],
)
def test_load_errors_name_the_file(tmp_path, content, message):
    path = tmp_path / "wrong.toml"
    path.write_bytes(content)
    with pytest.raises(PolicyError, match=f"wrong.toml: .*{message}"):
        Policy.load(path)


def test_load_of_a_missing_file(tmp_path):
    with pytest.raises(PolicyError, match="absent.toml: cannot read the policy: No such file"):
        Policy.load(tmp_path / "absent.toml")
    with pytest.raises(PolicyError, match="Is a directory"):
        Policy.load(tmp_path)


@pytest.mark.parametrize("what", ["weights", "cache"])
def test_weights_and_cache_may_be_encoded(what, tmp_path):
    shares = {"cpu": {"percent": 60, "codec": "int4"}, "disk": {"percent": 40, "codec": "int8"}}
    policy = Policy(**{what: shares})
    assert [getattr(policy, what)[tier].codec for tier in Tier] == ["none", "int4", "int8"]
    policy.save(tmp_path / "policy.toml")
    assert Policy.load(tmp_path / "policy.toml") == policy


def test_activations_may_not_be_encoded():
    with pytest.raises(PolicyError, match="activations: codec 'int4' on cpu; only weights and cache can"):
        Policy(activations={"cpu": {"percent": 100, "codec": "int4"}})


@pytest.mark.parametrize(
    "text",
    [
        "weights = " + "[" * 5000 + "]" * 5000,
        "gpu_batch_size = " + "9" * 5000,
        "weights = { gpu = 1" + "0" * 400 + " }",
        "attn_sparsity = 1" + "0" * 400,
        "[[weights]]\ngpu = 1",
        "gpu_batch_size = 1979-05-27",
    ],
)
def test_values_beyond_all_bounds_are_refused_with_the_file(text, tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text(text)
    with pytest.raises(PolicyError, match=r"policy\.toml: "):
        Policy.load(path)


@pytest.mark.parametrize("fields", [None, 3, [], "weights"])
def test_a_policy_must_be_a_mapping(fields):
    with pytest.raises(PolicyError, match="give a mapping"):
        Policy.from_dict(fields)


def test_a_policy_is_pickled():
    policy = Policy(gpu_batch_size=3, weights={"gpu": 20, "disk": {"percent": 80, "codec": "int4"}})
    assert pickle.loads(pickle.dumps(policy)) == policy == copy.deepcopy(policy)


def test_a_path_with_a_nul_is_refused():
    with pytest.raises(PolicyError):
        Policy.load("policy\0.toml")
