"""The fixed costs of cells: the difference between cells with attention and feed-forward cells."""

from flexgen.probe.overheads import _more_for_attention
from flexgen.results.trace import Event, LaneName
from flexgen.schedule.steps import Op, Step

ATTENDING = [False, True, False, True, False, False]
"""An embedding, two layers in halves, and a head."""


def computed(token, layer, seconds, op=Op.COMPUTE):
    return Event(Step(op, token, layer, 0), LaneName.COMPUTE, 10.0, 10.0 + seconds)


def test_the_difference_is_that_of_the_decodes_middle_layers():
    events = [computed(1, layer, seconds) for layer, seconds in enumerate((9.0, 3.0, 1.0, 5.0, 2.0, 9.0))]
    events += [computed(0, 1, 100.0), computed(1, 1, 100.0, Op.STORE_HIDDEN)]
    assert _more_for_attention(events, ATTENDING) == (3 + 5) / 2 - (1 + 2) / 2


def test_noise_gives_no_negative_cost():
    assert _more_for_attention([computed(1, 1, 1.0), computed(1, 2, 2.0)], ATTENDING) == 0


def test_layers_that_are_whole_have_no_difference():
    assert _more_for_attention([computed(1, 1, 1.0)], [False, True, False]) == 0
