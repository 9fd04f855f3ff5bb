import dataclasses
import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen.errors import PolicyError
from flexgen.flex_opt import CompressionConfig, Policy
from flexgen.policy import Split, Tier

FIELDS = (
    "gpu_batch_size num_gpu_batches w_gpu_percent w_cpu_percent cache_gpu_percent cache_cpu_percent "
    "act_gpu_percent act_cpu_percent overlap sep_layer pin_weight cpu_cache_compute attn_sparsity "
    "compress_weight comp_weight_config compress_cache comp_cache_config"
).split()


def test_arguments_by_place_and_by_name():
    assert list(inspect.signature(Policy).parameters) == FIELDS
    assert list(inspect.signature(CompressionConfig).parameters)[:4] == [
        "num_bits", "group_size", "group_dim", "symmetric"
    ]  # fmt: skip
    config = CompressionConfig(4, 64, 0, False)
    policy = Policy(4, 2, 20, 50, 0, 100, 10, 60, True, False, True, True, 0.5, False, config, False, config)
    assert dataclasses.astuple(policy)[:8] == (4, 2, 20, 50, 0, 100, 10, 60)
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.overlap = False
    assert dataclasses.replace(policy, w_cpu_percent=80).w_disk_percent == 0


pairs = st.tuples(st.integers(0, 100), st.integers(0, 100)).filter(lambda pair: sum(pair) <= 100)


@given(w=pairs, c=pairs, a=pairs, flags=st.tuples(*[st.booleans()] * 6), gbs=st.integers(1, 9))
def test_every_field_means_the_same_to_the_engine(policy, w, c, a, flags, gbs):
    overlap, sep_layer, pin_weight, cpu, weights, cache = flags
    old = policy(
        *w, *c, *a, gpu_batch_size=gbs, num_gpu_batches=3, overlap=overlap, sep_layer=sep_layer,
        pin_weight=pin_weight, cpu_cache_compute=cpu, compress_weight=weights, compress_cache=cache,
    )  # fmt: skip
    assert (old.w_disk_percent, old.cache_disk_percent, old.act_disk_percent) == tuple(
        100 - sum(pair) for pair in (w, c, a)
    )
    new = old.to_policy()
    assert (new.gpu_batch_size, new.num_gpu_batches, new.block_size) == (gbs, 3, 3 * gbs)
    assert (new.overlap, new.sep_layer, new.pin_weight) == (overlap, sep_layer, pin_weight)
    assert new.attend_on == ("cpu" if cpu else "gpu")
    for split, pair, compressed in (
        (new.weights, w, weights), (new.cache, c, cache), (new.activations, a, False)
    ):  # fmt: skip
        assert isinstance(split, Split)
        assert [split.percent(tier) for tier in Tier] == [*pair, 100 - sum(pair)]
        codecs = {split[tier].codec for tier in Tier if split.percent(tier)}
        assert codecs == {"int4" if compressed else "none"}


def test_more_bits_and_larger_groups(policy):
    def codec(**changes):
        config = dict(num_bits=4, group_size=64, group_dim=0, symmetric=False) | changes
        made = policy(compress_weight=True, comp_weight_config=CompressionConfig(**config))
        return made.to_policy().weights.gpu.codec

    assert codec(num_bits=8) == "int8"
    assert codec(group_size=128) == codec(group_dim=1) == "int4"
    assert codec(enabled=False) == "none"


def test_no_compression_needs_no_configuration(policy):
    assert policy(comp_weight_config=None, comp_cache_config=None).to_policy().weights.gpu.codec == "none"


GOOD = dict(num_bits=4, group_size=64, group_dim=2, symmetric=False)


@pytest.mark.parametrize(
    ("changes", "said"),
    {
        "bits": (dict(comp_cache_config=CompressionConfig(**GOOD | dict(num_bits=2))), ("2", "4, 8")),
        "group": (
            dict(comp_cache_config=CompressionConfig(**GOOD | dict(group_size=32))),
            ("32", "64 or more"),
        ),
        "dim": (
            dict(comp_cache_config=CompressionConfig(**GOOD | dict(group_dim=0))),
            ("group_dim is 0", "2"),
        ),
        "symmetric": (
            dict(comp_cache_config=CompressionConfig(**GOOD | dict(symmetric=True))),
            ("symmetric",),
        ),
        "none": (dict(comp_cache_config=None), ("comp_cache_config is None", "group_dim=2")),
        "sparse and compressed": (dict(attn_sparsity=0.5), ("attn_sparsity is 0.5", "int4")),
        "too much": (dict(w_gpu_percent=60, w_cpu_percent=60), ("weights", "120 percent")),
        "negative": (dict(act_cpu_percent=-1), ("activations", "-1")),
        "no batch": (dict(gpu_batch_size=0), ("gpu_batch_size", "0")),
        "sparsity": (dict(attn_sparsity=1.5, compress_cache=False), ("attn_sparsity", "1.5")),
    }.values(),
)
def test_an_invalid_policy_is_refused_at_once(policy, changes, said):
    with pytest.raises(PolicyError) as caught:
        policy(**dict(compress_cache=True) | changes)
    assert all(part in str(caught.value) for part in said), caught.value


def policy(**changes):
    """0.1's default policy with some fields changed."""
    fields = dict(
        zip(
            FIELDS,
            (1, 1, 100, 0, 100, 0, 100, 0, True, True, True, False, 1.0, False, None, False, None),
            strict=True,
        )
    )
    return Policy(**fields | changes)


def test_percentages_of_the_cost_model_of_0_1_are_accepted():
    """Its linear program has a rounding error around 0 and 100."""
    fields = dict(
        w_gpu_percent=-1e-10, w_cpu_percent=100.00000000001, cache_gpu_percent=33.3, cache_cpu_percent=66.7
    )
    given = policy(**fields, act_gpu_percent=100 + 1e-7, act_cpu_percent=-0.0)
    weights = given.to_policy().weights
    assert [weights.percent(tier) for tier in Tier] == [0, 100, 0]
    assert given.to_policy().activations.percent(Tier.GPU) == 100
    for outside in (-1e-5, 100.001, "all"):
        with pytest.raises(PolicyError):
            policy(w_gpu_percent=outside)
