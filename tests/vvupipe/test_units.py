"""Sizes, durations, CPU lists."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vvupipe.units import human_bytes, human_ns, parse_cpu_list, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "expected"), [("0", 0), ("4096", 4096), ("4k", 4096), ("4K", 4096), ("1GiB", 1 << 30), ("2mb", 2 << 20)]
)
def test_sizes(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "k", "-1", "4x", "1.5k", "4 k", "0x10"])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match="not a size"):
        parse_size(text)


@pytest.mark.parametrize("text", ["9" * 400, "8388608t", str(1 << 63)])
def test_sizes_that_no_file_has(text):
    with pytest.raises(ValueError, match="too large"):
        parse_size(text)
    assert parse_size(str((1 << 63) - 1)) == (1 << 63) - 1


@pytest.mark.parametrize("text", ["9" * 400, "99999999999h", "1000000001"])
def test_durations_that_nobody_sees_the_end_of(text):
    with pytest.raises(ValueError, match="too long"):
        parse_duration(text)


@pytest.mark.parametrize(("text", "expected"), [("10", 10), ("10s", 10), ("500ms", 0.5), ("2m", 120), ("1.5s", 1.5)])
def test_durations(text, expected):
    assert parse_duration(text) == expected


@pytest.mark.parametrize("text", ["", "s", "-1s", "10 s", "1d"])
def test_durations_that_are_none(text):
    with pytest.raises(ValueError, match="not a duration"):
        parse_duration(text)


@pytest.mark.parametrize(("text", "expected"), [("0", [0]), ("0,2-3", [0, 2, 3]), ("5-5", [5]), ("3,1", [3, 1])])
def test_cpu_lists(text, expected):
    assert parse_cpu_list(text) == expected


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "1,,2", "3-1", "\u00b2", "0-99999999999"])
def test_cpu_lists_that_are_none(text):
    with pytest.raises(ValueError, match="CPU"):
        parse_cpu_list(text)


@pytest.mark.parametrize(
    ("text", "says"), [("3-1", "like 1-3"), ("1,1", "CPU 1 more than once"), ("0-2,4,2", "CPU 2 more than once")]
)
def test_what_is_wrong_with_a_cpu_list(text, says):
    with pytest.raises(ValueError, match=says):
        parse_cpu_list(text)


@given(st.integers(0, 1 << 60))
def test_human_bytes_is_short(count):
    number, unit = human_bytes(count).split()
    assert unit in ("B", "KiB", "MiB", "GiB", "TiB")
    assert float(number) >= 0


def test_human_bytes():
    assert [human_bytes(n) for n in (0, 512, 1024, 1536, 512 << 20, 1 << 40)] == [
        "0 B", "512 B", "1 KiB", "1.50 KiB", "512 MiB", "1 TiB",
    ]  # fmt: skip


def test_human_ns():
    assert [human_ns(n) for n in (850, 1230, 12_300, 4_560_000, 1.2e9)] == [
        "850 ns", "1.23 us", "12.3 us", "4.56 ms", "1.20 s",
    ]  # fmt: skip
