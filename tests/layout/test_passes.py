"""The passes of prompts in parts: every column once, in order, and one pass for the first token of all."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen.layout.cache import Span
from flexgen.layout.passes import Passes


@given(
    widths=st.lists(st.integers(1, 50), min_size=1, max_size=4),
    chunk=st.integers(0, 60),
    cached=st.integers(0, 20),
    tokens=st.integers(1, 4),
)
def test_every_column_is_computed_once(widths, chunk, cached, tokens):
    passes = Passes(max(widths), chunk, cached)
    assert passes.first == (1 - -(-max(widths) // chunk) if chunk else 0)
    assert passes.extends == (0 < chunk < max(widths))
    for width in widths:
        spans = [passes.span(token, width) for token in range(passes.first, tokens)]
        computed = [span for span in spans if span.new]
        columns = [column for span in computed for column in range(span.length, span.length + span.new)]
        assert columns == list(range(cached, cached + width + tokens - 1))
        assert max(span.new for span in computed) <= passes.new
        first_token = spans[-passes.first]
        assert first_token.new and first_token.length + first_token.new == cached + width
        # Nothing is computed before the first part, and parts are even.
        assert all(not span.new for span in spans[: len(spans) - len(computed)])
        parts = [span.new for span in computed[: len(computed) - tokens + 1]]
        assert max(parts) - min(parts) <= 1


@pytest.mark.parametrize(
    ("span", "decodes", "extends", "pages"),
    [
        (Span(0, 1), False, False, (0, 0)),
        (Span(0, 9), False, False, (0, 2)),
        (Span(3, 1), True, False, (0, 1)),
        (Span(4, 1), True, False, (1, 1)),
        (Span(5, 7), False, True, (1, 3)),
        (Span(5, 0), False, False, (1, 1)),
    ],
)
def test_kinds_of_steps(span, decodes, extends, pages):
    assert (span.decodes, span.extends, span.pages(4)) == (decodes, extends, pages)
