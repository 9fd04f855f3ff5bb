import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen.units import GIB, KIB, MIB, align, format_bytes, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("4096", 4096),
        ("10GiB", 10 * GIB),
        ("10 gib", 10 * GIB),
        (" 2m ", 2 * MIB),
        ("1.5 GB", 1_500_000_000),
        ("3kb", 3000),
        ("3K", 3 * KIB),
        ("7 B", 7),
        ("1TiB", 1 << 40),
        ("2tb", 2 * 10**12),
        (512, 512),
        (2.9, 2),
    ],
)
def test_parse_bytes(text, count):
    assert parse_bytes(text) == count
    assert type(parse_bytes(text)) is int


@pytest.mark.parametrize(
    "wrong",
    ["", "GiB", "-1", "1 2", "1e3", "10 GiBs", "ten", "1.", ".5", -1, -0.5, True, float("nan"), float("inf")],
)
def test_an_invalid_size_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match="is not a size") as caught:
        parse_bytes(wrong)
    assert repr(wrong) in str(caught.value)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (1000 * KIB, "1000 KiB"),
        (1023 * MIB, "1023 MiB"),
        (20 * GIB + GIB // 4, "20.2 GiB"),
        (-1536, "-1.5 KiB"),
        (3 << 40, "3 TiB"),
        (12345 << 40, "12345 TiB"),
    ],
)
def test_format_bytes(count, text):
    assert format_bytes(count) == text


@given(count=st.integers(0, 1 << 50))
def test_formatted_bytes_read_back_within_rounding(count):
    text = format_bytes(count)
    assert "e" not in text
    assert parse_bytes(text) == pytest.approx(count, rel=0.006)  # three digits, and whole bytes


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 us"),
        (0.00025, "250 us"),
        (0.0123, "12.3 ms"),
        (0.9999, "1 s"),
        (1.0, "1 s"),
        (59.2, "59.2 s"),
        (75, "1 min 15 s"),
        (3599.6, "1 h 0 min"),
        (3725, "1 h 2 min"),
        (100 * 3600, "100 h 0 min"),
    ],
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


@given(count=st.integers(0, 1 << 60), to=st.integers(1, 1 << 20))
def test_align_is_the_next_multiple(count, to):
    assert align(count, to) % to == 0
    assert 0 <= align(count, to) - count < to


@pytest.mark.parametrize(
    "wrong",
    [
        "1" + "0" * 400,
        "9" * 5000,
        "9" * 30 + "TiB",
        10**30,
        10**5000,
        1e300,
        -(10**5000),
        None,
        [1],
        b"1",
        "\u0661",
    ],
    ids=lambda wrong: type(wrong).__name__,
)
def test_impossible_values_are_refused(wrong):
    with pytest.raises(ValueError, match="is not a size") as caught:
        parse_bytes(wrong)
    assert len(str(caught.value)) < 250


def test_counts_beyond_floats_can_be_written():
    assert format_bytes(2**2000) == "2**1960 TiB"
