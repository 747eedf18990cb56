"""What the process of a vCPU calls (see object_file). parts: address of a driver_parts.PARTS."""

import numpy as np
from numba import int64

from kernels import driver_layout as layout
from kernels import driver_ring, driver_transfer, driver_verify, driver_workload
from kernels.driver_parts import PARTS
from kernels.jit import spliced
from kernels.loop_record import POLLFD
from kernels.memory import records_at, table_at

_HEAD = np.int32


@spliced
def ring_of(parts):
    """The vring that PARTS tell of."""
    return records_at(parts.ring, int64(1), layout.DRIVER_RING)[0]


@spliced
def tags_of(parts):
    """Its requests, and which of them each descriptor heads."""
    return records_at(parts.tags, parts.num_tags, layout.TAG), records_at(parts.heads, parts.num_heads, _HEAD)


@spliced
def job_of(parts):
    """All arguments of a job's kernel."""
    tags, heads = tags_of(parts)
    return (
        records_at(parts.wait, int64(1), layout.WAIT)[0],
        ring_of(parts),
        records_at(parts.pollfds, int64(2), POLLFD),
        tags,
        heads,
        records_at(parts.job, int64(1), layout.JOB)[0],
        records_at(parts.record, int64(1), layout.VCPU)[0],
        records_at(parts.directions, int64(2), layout.DIRECTION),
        table_at(parts.histograms, int64(2), int64(layout.BUCKETS)),
    )


def workload(parts):
    """driver_workload.drive."""
    return driver_workload.drive(*job_of(records_at(parts, int64(1), PARTS)[0]))


def verify(parts):
    """driver_verify.drive_verify."""
    return driver_verify.drive_verify(*job_of(records_at(parts, int64(1), PARTS)[0]))


def transfer(parts):
    """driver_transfer.transfer."""
    return driver_transfer.transfer(*job_of(records_at(parts, int64(1), PARTS)[0]))


def reset_ring(parts):
    """driver_ring.reset_ring."""
    driver_ring.reset_ring(ring_of(records_at(parts, int64(1), PARTS)[0]))
    return 0


def attach_tags(parts):
    """driver_ring.attach_tags."""
    each = records_at(parts, int64(1), PARTS)[0]
    tags, heads = tags_of(each)
    driver_ring.attach_tags(ring_of(each), tags, heads)
    return 0


def resubmit(parts):
    """driver_ring.resubmit."""
    each = records_at(parts, int64(1), PARTS)[0]
    tags, heads = tags_of(each)
    driver_ring.resubmit(ring_of(each), tags, heads)
    return 0


def publish(parts):
    """driver_ring.publish."""
    driver_ring.publish(ring_of(records_at(parts, int64(1), PARTS)[0]))
    return 0


ENTRIES = (workload, verify, transfer, reset_ring, attach_tags, resubmit, publish)
