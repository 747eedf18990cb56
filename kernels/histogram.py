"""A log-linear histogram of durations: constant relative width, no division, no search."""

from numba import int64, types, uint64
from numba.extending import intrinsic

from kernels.driver_layout import BUCKETS, SUB_BITS
from kernels.jit import kernel

_TOP_BIT = 63


@intrinsic
def leading_zeros(typing_context, value):
    """Zero bits above the highest one of a uint64; 64 for 0."""

    def generate(context, builder, signature, arguments):
        return builder.ctlz(arguments[0], context.get_constant(types.boolean, False))

    return types.uint64(types.uint64), generate


@kernel
def bucket_of(duration_ns):
    """Bucket of a uint64: itself below 32, then 32 buckets for each power of two; the last one takes all above."""
    if duration_ns < uint64(1 << SUB_BITS):
        return int64(duration_ns)
    shift = uint64(_TOP_BIT - SUB_BITS) - leading_zeros(duration_ns)
    return min(int64((shift << uint64(SUB_BITS)) + (duration_ns >> shift)), BUCKETS - 1)


@kernel
def note(direction, counts, length, duration_ns):
    """Count one request of `length` bytes. direction: DIRECTION. counts: uint64[BUCKETS]."""
    duration = uint64(max(duration_ns, 0))
    counts[bucket_of(duration)] += uint64(1)
    direction.bytes += length
    direction.latency_sum_ns += duration
    direction.latency_max_ns = max(direction.latency_max_ns, duration)
    if duration < direction.latency_min_ns or direction.requests == uint64(0):
        direction.latency_min_ns = duration
    direction.requests += uint64(1)
