"""Ids on the simulated GPU equal those on the CPU. Downloads arrive only when the host has waited for them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("simulated", reason="runs on the simulated GPU: `make test-cuda`")

from simulated import cases, runtime
from simulated.numbers import Numbers
from simulated.threads import in_every_thread


@settings(max_examples=20, phases=cases.WITHOUT_SHRINKING)
@given(
    config=st.sampled_from([cases.OPT, cases.LLAMA]),
    policy=cases.policies(exact=True),
    order=cases.orders(),
    stop=st.sampled_from([(), tuple(range(0, cases.VOCAB, 3))]),
)
def test_ids_are_those_of_the_cpu(config, policy, order, stop):
    expected = cases.ids_on("cpu", config, policy, stop)
    runtime.reset()
    with in_every_thread(Numbers):
        found = cases.ids_on("cuda", config, policy, stop, order=order)
    np.testing.assert_array_equal(found, expected)
    assert runtime.counters().hazards == 0


@pytest.mark.parametrize("codec", ["int4", "int8"])
@pytest.mark.parametrize("attend_on", ["gpu", "cpu"])
def test_encoded_weights_and_cache(codec, attend_on):
    policy = cases.policy(weights=cases.encoded(codec), cache=cases.encoded(codec), attend_on=attend_on)
    expected = cases.ids_on("emulated", cases.LLAMA, policy)
    with in_every_thread(Numbers):
        found = cases.ids_on("cuda", cases.LLAMA, policy)
    np.testing.assert_array_equal(found, expected)


def test_logits_of_all_positions():
    policy = cases.policy()
    with cases.open_on("cpu", cases.OPT, policy) as model:
        expected = model.forward(cases.PROMPTS)
    with in_every_thread(Numbers), cases.open_on("cuda", cases.OPT, policy) as model:
        found = model.forward(cases.PROMPTS)
    np.testing.assert_allclose(found, expected, atol=1e-5)
