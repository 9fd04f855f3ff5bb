"""Attention on the host of a machine with a GPU, in virtual time: what the order can hide and what it cannot."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen.predict.timeline import simulate
from flexgen.results.trace import LaneName
from flexgen.schedule.orders import ORDERS
from flexgen.schedule.steps import Grid, Op

LINK, DEVICE, HOST, BACK = LaneName.TO_DEVICE, LaneName.COMPUTE, LaneName.HOST, LaneName.FROM_DEVICE
CROSSING = 0.02  # of the bytes of a batch on the link for a layer: hidden states, queries, results


def run(name, batches, weights, project, attend, rest, layers=12, tokens=3, units=1):
    """The trace of an order: seconds of each batch in each layer, weights spread over the batches.

    `units` = 2 streams attention and MLP apart: the second has no attention and two thirds of the weights and of
    what is left to compute.
    """
    order = ORDERS[name]
    slots, splits = order.slots, order.splits_attention
    grid = Grid(tokens, layers * units, batches, batches, slots.weights, slots.cells, splits)

    def costs(step):
        is_mlp = units == 2 and step.layer % 2 == 1
        share = 1 if units == 1 else 2 / 3 if is_mlp else 1 / 3
        match step.op:
            case Op.LOAD_WEIGHTS:
                return [[(LINK, weights * share)]]
            case Op.LOAD_HIDDEN:
                return [[(LINK, CROSSING)]]
            case Op.PROJECT if not is_mlp:
                return [[(DEVICE, project), (BACK, 3 * CROSSING)]]
            case Op.ATTEND if not is_mlp:
                return [[(HOST, attend)]]
            case Op.LOAD_ATTENTION if not is_mlp:
                return [[(LINK, CROSSING)]]
            case Op.COMPUTE if splits or is_mlp:
                return [[(DEVICE, rest * share)]]
            case Op.COMPUTE:  # the device waits for the host, which needs the device's queries
                return [[(DEVICE, project), (HOST, attend), (DEVICE, rest * share)]]
            case Op.STORE_HIDDEN:
                return [[(BACK, CROSSING)]]
        return []

    return simulate(order(grid), grid, costs)


def over_bound(trace):
    """How much longer than its longest lane."""
    return trace.span / max(trace.busy().values())


def test_balanced_costs_come_near_the_longest_lane():
    costs = dict(batches=8, weights=0.9, project=0.25, attend=1.0, rest=0.7)
    split = run("overlap_cpu_attention", **costs)
    assert over_bound(split) <= 1.05
    whole = run("overlap_multi_batch", **costs)
    arithmetic = whole.busy()[DEVICE] + whole.busy()[HOST]
    assert whole.span >= 0.99 * arithmetic > 1.8 * split.span


costs = st.sampled_from([0.3, 0.6, 0.8, 0.9, 1.0])


@settings(max_examples=60)
@given(
    batches=st.integers(3, 10),
    weights=costs,
    attend=costs,
    device=costs,
    share=st.sampled_from([0.1, 0.25, 0.4]),
)
def test_whatever_is_longest_hides_the_others(batches, weights, attend, device, share):
    each = dict(weights=weights, project=device * share, attend=attend, rest=device * (1 - share))
    assert over_bound(run("overlap_cpu_attention", batches, **each)) <= 1.1


@given(weights=costs, attend=costs, device=costs)
@settings(max_examples=20)
def test_two_batches_are_no_worse_than_whole_cells(weights, attend, device):
    """The loss is in the first layers: their weights arrive together with results instead of before them."""
    each = dict(batches=2, weights=weights, project=device / 4, attend=attend, rest=device * 3 / 4)
    assert run("overlap_cpu_attention", **each).span <= 1.05 * run("overlap_multi_batch", **each).span


def test_with_the_mlp_apart_the_host_waits_for_it():
    """Its visit has nothing to attend, so that it adds to attention; whole layers hide it."""
    costs = dict(batches=8, weights=0.5, project=0.1, attend=0.9, rest=0.6)
    whole, apart = (run("overlap_cpu_attention", units=units, **costs) for units in (1, 2))
    assert over_bound(whole) <= 1.05
    mlp = 0.6 * 2 / 3 * 8 * 12 * 3
    assert apart.span == pytest.approx(apart.busy()[HOST] + mlp, rel=0.05)
    assert apart.span < run("overlap_multi_batch", units=2, **costs).span
