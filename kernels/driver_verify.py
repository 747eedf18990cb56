"""Write every block with a pattern of its own in random order, flush, read all back in another order and compare."""

from numba import uint32, uint64

from kernels.driver_blk import PUBLISH_EVERY, check_status, show
from kernels.driver_layout import COMMAND, DONE, PHASE_FLUSH, PHASE_READ, PHASE_WRITE, READ, WRITE
from kernels.driver_random import fill_pattern, holds_pattern, next_in_order, pattern_start, start_order
from kernels.driver_ring import count_used, put_request, take_used
from kernels.driver_wait import command_waiting, forget_idling, wait_a_little
from kernels.driver_workload import begin
from kernels.histogram import note
from kernels.jit import kernel
from kernels.memory import monotonic_ns
from kernels.virtio_layout import BLK_T_FLUSH, BLK_T_IN, BLK_T_OUT, SECTOR_SHIFT


@kernel
def order_seed(job, phase):
    """Seed of the order of a phase: another one for each phase and pass."""
    return job.seed + uint64(4) * job.generation + uint64(phase)


@kernel
def enter_phase(job, phase):
    """Begin a phase of the present pass."""
    job.phase = phase
    job.issued = uint64(0)
    if phase == PHASE_WRITE:
        job.written = uint64(0)
        start_order(job, order_seed(job, PHASE_WRITE))
    if phase == PHASE_READ:
        # A pass that was cut short is read back in the order in which it was written: those blocks, no others.
        whole = job.written == job.blocks
        start_order(job, order_seed(job, PHASE_READ if whole else PHASE_WRITE))


@kernel
def issue_next(ring, tag, job, now):
    """Start the next request of the phase on `tag`. False when the phase has none left."""
    if job.phase == PHASE_WRITE:
        if job.deadline_ns != 0 and now >= job.deadline_ns:
            return False
        if job.issued == job.blocks:
            return False
        tag.kind = uint32(BLK_T_OUT)
        tag.block = next_in_order(job)
        fill_pattern(tag.data, tag.length, pattern_start(job.seed, tag.block, job.generation))
        job.written += uint64(1)
    elif job.phase == PHASE_READ:
        if job.issued == job.written:
            return False
        tag.kind = uint32(BLK_T_IN)
        tag.block = next_in_order(job)
        # What is left in the buffer could be the very pattern that is expected: spoil it.
        fill_pattern(tag.data, tag.length, pattern_start(~job.seed, tag.block, job.generation))
    else:
        if job.issued or not job.can_flush:
            return False
        tag.kind = uint32(BLK_T_FLUSH)
        tag.block = uint64(0)
    tag.sector = uint64(0) if job.phase == PHASE_FLUSH else job.first_sector + tag.block * job.block_sectors
    tag.start_ns = now
    job.issued += uint64(1)
    put_request(ring, tag)
    return True


@kernel
def finish(tag, job, record, directions, histograms, now):
    """A request came back: count it, and compare what was read."""
    if not check_status(tag, record):
        return
    if tag.kind == BLK_T_FLUSH:
        record.flushes += uint64(1)
        return
    direction = READ if tag.kind == BLK_T_IN else WRITE
    note(directions[direction], histograms[direction], tag.length, now - tag.start_ns)
    if tag.kind == BLK_T_IN:
        record.verified_blocks += uint64(1)
        if not holds_pattern(tag.data, tag.length, pattern_start(job.seed, tag.block, job.generation)):
            if record.mismatches == uint64(0):
                record.first_mismatch_bytes = tag.sector << uint64(SECTOR_SHIFT)
            record.mismatches += uint64(1)


@kernel
def fill_up(ring, tags, job, now):
    """Start requests on free tags, as many as the phase has."""
    for k in range(job.depth):
        if not tags[k].in_flight and not issue_next(ring, tags[k], job, now):
            return


@kernel
def advance(job, record, now):
    """The phase is over and nothing is in flight. True when the job is over too."""
    if job.phase == PHASE_WRITE:
        enter_phase(job, PHASE_FLUSH)
        return False
    if job.phase == PHASE_FLUSH:
        enter_phase(job, PHASE_READ)
        return False
    if job.written == job.blocks:
        record.passes += uint64(1)
    if job.runtime_ns == 0 or now >= job.deadline_ns:
        return True
    job.generation += uint64(1)
    enter_phase(job, PHASE_WRITE)
    return False


@kernel
def drive_verify(wait, ring, pollfds, tags, heads, job, record, directions, histograms):
    """Run verify until it is over (DONE), a command waits (COMMAND) or the device broke a rule (ERR_*).

    When the runtime ends, what was written in this pass is still read back. The arguments are those of
    driver_workload.drive.
    """
    first = record.started_ns == 0
    now = begin(wait, ring, job, record)
    if first:
        enter_phase(job, PHASE_WRITE)
    while True:
        if not job.stopping:
            fill_up(ring, tags, job, now)
        show(ring, wait, record)
        if ring.in_flight == 0:
            if job.stopping or advance(job, record, now):
                return DONE
            continue
        used = 0
        while used == 0:
            if command_waiting(wait):
                return COMMAND
            used = count_used(ring)
            if used == 0 and wait_a_little(wait, ring, pollfds):
                return COMMAND
        if used < 0:
            return used
        forget_idling(wait)
        now = monotonic_ns(wait.scratch)
        for k in range(used):
            index = take_used(ring, tags, heads)
            if index < 0:
                return index
            finish(tags[index], job, record, directions, histograms, now)
            if not job.stopping:
                issue_next(ring, tags[index], job, now)
            if k % PUBLISH_EVERY == PUBLISH_EVERY - 1:
                show(ring, wait, record)
        record.ended_ns = now
