import pytest

from kernels.driver_layout import BUCKETS
from vvupipe.vm.latency_report import Latency, bucket_start

pytestmark = pytest.mark.timeout(30)


def latency(durations):
    counts = [0] * BUCKETS
    for duration in durations:
        counts[next(k for k in range(BUCKETS) if bucket_start(k + 1) > duration)] += 1
    return Latency(counts, sum(durations), min(durations, default=0), max(durations, default=0))


def test_nothing_was_measured():
    nothing = latency([])
    assert (nothing.mean_ns, nothing.percentile_ns(99.0), nothing.picture()) == (0.0, 0, [])


def test_one_request_is_every_percentile():
    one = latency([12345])
    assert {one.percentile_ns(percent) for percent in (0.0, 50.0, 99.99, 100.0)} == {12345}


def test_percentiles():
    hundred = latency([1000 * k for k in range(1, 101)])
    for percent in (50.0, 90.0, 99.0):
        assert hundred.percentile_ns(percent) == pytest.approx(1000 * percent, rel=0.032)
    assert hundred.as_dict()["mean"] == 50500.0


def test_every_request_is_in_the_picture_once():
    measured = latency([3, 900] + [1500] * 90_000 + [3000] * 90_000 + [10**6, 10**9])
    # The lonely ones at either end share a row, and keep out of those with many.
    assert measured.rows() == [(2, 2), (1024, 90_000), (2048, 90_000), (4096, 2)]
    assert [line.split()[3:5] for line in measured.picture()][::3] == [["<0.01", "%"]] * 2


def test_the_longest_bar_is_the_largest_share():
    lines = latency([1500] * 300 + [3000] * 100).picture()
    assert [line.split()[:3] for line in lines] == [["from", "1.02", "us"], ["from", "2.05", "us"]]
    assert lines[0].count("█") == 40
    assert "75.00 %" in lines[0]
