import json
import math

import pytest

from flexgen.policy import Policy, Tier
from flexgen.results.bounds import bound_seconds
from flexgen.results.report import PlacesUsed, Report, Stage
from flexgen.results.trace import LaneName, Phase

KEYS = """model policy device prompt_len gen_len num_prompts prefill_s decode_s total_s prefill_tokens_s
decode_tokens_s throughput_tokens_s lanes phases waits_for bottleneck bound_s bound_share
plan_bytes peak_bytes placement""".split()


def report(**changes):
    policy = Policy(gpu_batch_size=4, num_gpu_batches=2, weights={"cpu": 60, "disk": 40})
    split = {Tier.GPU: (0.0, 0.0), Tier.CPU: (60.0, 58.5), Tier.DISK: (40.0, 41.5)}
    fields = dict(
        model="demo",
        policy=policy,
        device="cpu",
        dtype="float32",
        order="normal",
        prompt_len=10,
        gen_len=5,
        num_prompts=8,
        prefill_s=2.0,
        decode_s=6.0,
        prompt_tokens=80,
        phases={
            Phase.PREFILL: {LaneName.COMPUTE: 1.8, LaneName.DISK_READ: 0.5},
            Phase.DECODE: {LaneName.COMPUTE: 2.0, LaneName.DISK_READ: 5.4, LaneName.TO_DEVICE: 3.0},
        },
        plan_bytes=dict(zip(Tier, (0, 2048, 4096), strict=True)),
        peak_bytes=dict(zip(Tier, (0, 1024, 4096), strict=True)),
        placement={"weights": split},
    )
    return Report(**fields | changes)


def test_figures_add_up():
    found = report()
    assert found.total_s == 8.0
    assert found.prefill_tokens_s == 40.0
    assert found.decode_tokens_s == pytest.approx(8 * 4 / 6.0)
    assert found.throughput_tokens_s == 5.0
    assert found.lanes == pytest.approx(
        {LaneName.COMPUTE: 3.8, LaneName.DISK_READ: 5.9, LaneName.TO_DEVICE: 3.0}
    )
    assert found.waits_for == {Phase.PREFILL: LaneName.COMPUTE, Phase.DECODE: LaneName.DISK_READ}
    assert found.bottleneck is LaneName.DISK_READ
    # The longest lane in all would be 5.9 of 8: prefill and decode wait for one after the other.
    assert found.bound_s == bound_seconds(found.phases) == pytest.approx(7.2)
    assert found.bound_share == pytest.approx(0.9)


def test_json_is_one_line_with_every_key():
    text = report().to_json()
    assert "\n" not in text
    found = json.loads(text)
    assert set(KEYS) <= found.keys()
    for key in ("plan_bytes", "peak_bytes", "placement"):
        assert set(found[key]) == {"gpu", "cpu", "disk"}
    assert found["placement"]["disk"]["weights"] == {"asked": 40.0, "achieved": 41.5}
    assert found["bottleneck"] == "disk_read"
    assert found["phases"]["prefill"] == {"compute": 1.8, "disk_read": 0.5}
    assert found["waits_for"] == {"prefill": "compute", "decode": "disk_read"}
    assert found["lanes"]["compute"] == pytest.approx(3.8)
    assert found["busy"]["compute"] == pytest.approx(3.8 / 8)
    assert (found["bound_s"], found["bound_share"]) == (pytest.approx(7.2), pytest.approx(0.9))
    assert Policy.from_dict(found["policy"]) == report().policy


def test_card_has_the_main_figures():
    card = report().card()
    assert "cpu 58.5% (requested 60), disk 41.5% (requested 40)" in card
    assert "90% of the best that the hardware allows: prefill waits for compute, decode for disk_read" in card
    assert "timed alone: compute 1.8" in card and "timed alone: disk_read 5.4" in card  # the longest first
    assert "compute 1.8 s (90%)" in card and "disk_read 5.4 s (90%)" in card  # share of its phase
    assert "2 KiB planned, 1 KiB at the peak" in card
    assert "bytes gpu" not in card  # nothing is there
    assert len({len(line) for line in card.splitlines() if set(line) == {"-"}}) == 1


ROOFLINE = {
    Phase.PREFILL: {LaneName.COMPUTE: 1.6, LaneName.DISK_READ: 0.5},
    Phase.DECODE: {LaneName.COMPUTE: 0.2, LaneName.TO_DEVICE: 0.4},
}


def test_a_starved_lane_is_seen_by_the_roofline():
    starved = report(
        phases={Phase.PREFILL: {LaneName.COMPUTE: 1.8}, Phase.DECODE: {LaneName.COMPUTE: 6.0}},
        roofline=ROOFLINE,
    )
    # A share of 8 s: gaps between kernels count as work in the bound.
    assert starved.bound_share == pytest.approx(7.8 / 8)
    assert starved.roofline_s == pytest.approx(2.0)
    assert starved.roofline_share == starved.goal_share == pytest.approx(0.25)
    found = json.loads(starved.to_json())
    assert (found["roofline_s"], found["goal_share"]) == (pytest.approx(2.0), pytest.approx(0.25))
    assert found["roofline"]["decode"] == {"compute": 0.2, "to_device": 0.4}
    assert "roofline" in starved.card() and "25%: bytes and flops alone take 2" in starved.card()


def test_the_goal_is_compared_with_the_smaller_share():
    fast = {phase: {LaneName.COMPUTE: 3.9} for phase in Phase}
    assert report(roofline=fast).goal_share == report().bound_share == pytest.approx(0.9)
    assert report(phases={}, roofline=ROOFLINE).goal_share == pytest.approx(0.25)
    assert report(phases={}).goal_share is None and report().roofline_share is None
    assert "roofline" not in report().card()


def test_card_names_codecs():
    encoded = Policy(
        weights={"cpu": {"percent": 60, "codec": "int8"}, "disk": 40},
        cache={"gpu": 50, "cpu": {"percent": 50, "codec": "int4"}},
    )
    halves = {Tier.GPU: (50.0, 50.0), Tier.CPU: (50.0, 50.0), Tier.DISK: (0.0, 0.0)}
    weights = report().placement["weights"]
    card = report(policy=encoded, placement={"weights": weights, "cache": halves}).card()
    assert "cpu 58.5% in int8 (requested 60), disk 41.5% (requested 40)" in card
    assert "gpu 50.0% (requested 50), cpu 50.0% in int4 (requested 50)" in card


def test_without_lanes_there_is_no_bound():
    found = report(phases={})
    assert found.bound_share is None and found.bottleneck is None and found.lanes == {}
    assert "bound" not in found.card()
    assert json.loads(found.to_json())["bound_share"] is None


def test_card_shows_ragged_prompts_and_projection():
    found = report(prompt_tokens=40, padded_share=0.125, projected_from=3)
    card = found.card()
    assert "8 of up to 10 tokens (5.0 on average), 5 new tokens each, 12.5% padding" in card
    assert json.loads(found.to_json())["padded_share"] == 0.125
    assert "padding" not in report().card()
    assert "projected from 3 tokens" in card


def test_one_token_has_no_decode():
    found = report(gen_len=1, decode_s=0.0)
    assert found.decode_tokens_s == 0.0
    assert math.isfinite(found.throughput_tokens_s)
    prefill = {Phase.PREFILL: {LaneName.COMPUTE: 1.0}, Phase.DECODE: {}}
    alone = report(gen_len=1, decode_s=0.0, phases=prefill)
    assert alone.bound_share == 0.5 and alone.waits_for == {Phase.PREFILL: LaneName.COMPUTE}
    assert alone.card().rstrip("-\n").endswith("hardware allows: prefill waits for compute")


def test_the_bottleneck_has_the_largest_part_of_the_bound():
    """Not the lane that is busiest in all: it may hide behind others in both phases."""
    phases = {
        Phase.PREFILL: {LaneName.COMPUTE: 5.0, LaneName.TO_DEVICE: 4.0},
        Phase.DECODE: {LaneName.DISK_READ: 3.0, LaneName.TO_DEVICE: 2.0},
    }
    assert max(report(phases=phases).lanes.values()) == report(phases=phases).lanes[LaneName.TO_DEVICE]
    assert report(phases=phases).bottleneck is LaneName.COMPUTE
    same = {phase: {LaneName.DISK_READ: 2.0, LaneName.COMPUTE: 1.0} for phase in Phase}
    assert report(phases=same).bottleneck is LaneName.DISK_READ
    assert "hardware allows: the run waits for disk_read" in report(phases=same).card()


def test_stages_are_on_the_card_and_in_the_json():
    stages = {
        Stage.FILL: PlacesUsed(0.5, 1.0),
        Stage.STEADY: PlacesUsed(6.0, 0.875),
        Stage.DRAIN: PlacesUsed(1.5, 0.3),
    }
    found = report(stages=stages, new_tokens=31)
    (line,) = (line for line in found.card().splitlines() if line.startswith("stages"))
    assert "fill 500 ms with 100% of the places in use, steady 6 s with 88%" in line
    assert json.loads(found.to_json())["stages"]["drain"] == {"seconds": 1.5, "used": 0.3}
    assert "stages" not in report().card() and json.loads(report().to_json())["stages"] == {}
