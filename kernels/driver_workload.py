"""Random and sequential reads and writes at a constant depth, measured."""

from numba import uint32, uint64

from kernels.driver_blk import PUBLISH_EVERY, check_status, show
from kernels.driver_layout import COMMAND, DONE, RANDOM, READ, WRITE
from kernels.driver_random import multiply_high, next_random
from kernels.driver_ring import count_used, put_request, refuse_calls, take_used
from kernels.driver_wait import command_waiting, forget_idling, wait_a_little
from kernels.histogram import note
from kernels.jit import kernel
from kernels.memory import monotonic_ns
from kernels.virtio_layout import BLK_T_IN, BLK_T_OUT


@kernel
def may_issue(job, now):
    """Whether another request is to be started."""
    if job.stopping:
        return False
    if job.deadline_ns != 0 and now >= job.deadline_ns:
        job.stopping = 1
        return False
    return job.limit == uint64(0) or job.issued < job.limit


@kernel
def issue(ring, tag, job, now):
    """Start the next request of the pattern on `tag`."""
    if job.order == RANDOM:
        block = multiply_high(next_random(job), job.blocks)
    else:
        block = job.cursor
        job.cursor = block + uint64(1) if block + uint64(1) < job.blocks else uint64(0)
    if job.only >= 0:
        tag.kind = uint32(job.only)
    else:
        tag.kind = uint32(BLK_T_IN) if next_random(job) < job.read_share else uint32(BLK_T_OUT)
    tag.sector = job.first_sector + block * job.block_sectors
    tag.start_ns = now
    job.issued += uint64(1)
    put_request(ring, tag)


@kernel
def begin(wait, ring, job, record):
    """Entry into a job's kernel, the first or a later one. Returns the time."""
    refuse_calls(ring)
    forget_idling(wait)
    now = monotonic_ns(wait.scratch)
    if record.started_ns == 0:
        record.started_ns = now
        if job.runtime_ns != 0:
            job.deadline_ns = now + job.runtime_ns
    return now


@kernel
def drive(wait, ring, pollfds, tags, heads, job, record, directions, histograms):
    """Run the workload until it is over (DONE), a command waits (COMMAND) or the device broke a rule (ERR_*).

    wait: WAIT. ring: DRIVER_RING. pollfds: POLLFD[2]. tags: TAG[job.depth]. heads: int32[ring.size]. job: JOB.
    record: VCPU. directions: DIRECTION[2]. histograms: uint64[2, BUCKETS].
    """
    now = begin(wait, ring, job, record)
    for k in range(job.depth):
        if not tags[k].in_flight and may_issue(job, now):
            issue(ring, tags[k], job, now)
    show(ring, wait, record)
    while ring.in_flight:
        if command_waiting(wait):
            return COMMAND
        used = count_used(ring)
        if used == 0:
            if wait_a_little(wait, ring, pollfds):
                return COMMAND
            continue
        if used < 0:
            return used
        forget_idling(wait)
        now = monotonic_ns(wait.scratch)
        for k in range(used):
            index = take_used(ring, tags, heads)
            if index < 0:
                return index
            tag = tags[index]
            if check_status(tag, record):
                direction = READ if tag.kind == BLK_T_IN else WRITE
                note(directions[direction], histograms[direction], tag.length, now - tag.start_ns)
            if may_issue(job, now):
                issue(ring, tag, job, now)
            if k % PUBLISH_EVERY == PUBLISH_EVERY - 1:
                show(ring, wait, record)
        show(ring, wait, record)
        record.ended_ns = now
    return DONE
