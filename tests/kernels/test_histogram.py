import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import driver_layout as layout
from kernels import histogram
from vvupipe.vm.latency_report import Latency, bucket_start

pytestmark = pytest.mark.timeout(120)


@settings(deadline=None)
@given(st.integers(0, 2**43 - 1))
def test_a_duration_lies_in_its_bucket(duration):
    index = int(histogram.bucket_of(np.uint64(duration)))
    assert bucket_start(index) <= duration < bucket_start(index + 1)
    assert bucket_start(index + 1) - bucket_start(index) <= max(1, duration / 32)


@pytest.mark.parametrize("duration", [2**43, 2**50, 2**63, 2**64 - 1])
def test_what_is_too_long_goes_to_the_last_bucket(duration):
    assert histogram.bucket_of(np.uint64(duration)) == layout.BUCKETS - 1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=200))
def test_summary_agrees_with_the_list(durations):
    directions = np.zeros(1, layout.DIRECTION)
    counts = np.zeros(layout.BUCKETS, np.uint64)
    for duration in durations:
        histogram.note(directions[0], counts, np.uint64(512), duration)
    part = directions[0]
    assert (part["requests"], part["bytes"]) == (len(durations), 512 * len(durations))
    assert (part["latency_min_ns"], part["latency_max_ns"]) == (min(durations), max(durations))
    latency = Latency([int(n) for n in counts], int(part["latency_sum_ns"]), min(durations), max(durations))
    assert latency.mean_ns == sum(durations) / len(durations)
    ordered = sorted(durations)
    for percent in (50, 99, 99.9):
        rank = max(1, -(-len(ordered) * percent // 100))
        exact = ordered[int(rank) - 1]
        assert abs(latency.percentile_ns(percent) - exact) <= exact / 32 + 1
