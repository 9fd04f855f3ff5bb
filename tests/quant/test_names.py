"""A codec's name stands in two places, because a policy does without torch: a name in one alone would do nothing."""

from flexgen import policy, quant


def test_a_policy_knows_the_codecs_that_there_are():
    assert ("none", *quant.CODECS) == policy.CODECS
