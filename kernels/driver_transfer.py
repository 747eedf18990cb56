"""Moving one window of consecutive sectors between the disk, guest memory and (if wanted) a file of the host."""

import numpy as np
from numba import int32, int64, uint32, uint64

from kernels.driver_blk import check_status, show
from kernels.driver_layout import COMMAND, DONE, ERR_FILE
from kernels.driver_ring import count_used, put_request, take_used
from kernels.driver_wait import command_waiting, forget_idling, wait_a_little
from kernels.driver_workload import begin
from kernels.jit import kernel
from kernels.memory import EINTR, last_errno, libc_pread, libc_pwrite, monotonic_ns
from kernels.virtio_layout import BLK_T_IN, BLK_T_OUT, SECTOR_SHIFT

_ZERO = np.uint64(0)


@kernel
def file_io(job, record, address, length, offset, writing):
    """pread or pwrite until all of `length` is done. False: VCPU.file_errno says why."""
    fd = int32(job.file_fd)
    while length > _ZERO:
        done = libc_pwrite(fd, address, length, offset) if writing else libc_pread(fd, address, length, offset)
        if done <= 0:
            code = last_errno() if done < 0 else int64(0)
            if code == EINTR:
                continue
            record.file_errno = code
            return False
        address += uint64(done)
        length -= uint64(done)
        offset += done
    return True


@kernel
def may_issue_chunk(job):
    """Whether another chunk is to be started."""
    return not job.stopping and job.issued < job.chunks


@kernel
def fail(job):
    """The file failed: start nothing more; what is in flight is waited for, so that the ring can be used again."""
    job.file_failed = 1
    job.stopping = 1


@kernel
def issue_chunk(ring, tag, job, record):
    """Start the next chunk on `tag`; its data is first read from the file when it is to be written."""
    begin_bytes = job.issued * job.chunk_bytes
    tag.kind = uint32(job.kind)
    tag.block = job.issued
    tag.data = job.window + begin_bytes
    tag.length = min(job.chunk_bytes, job.total_bytes - begin_bytes)
    tag.sector = job.first_sector + (begin_bytes >> uint64(SECTOR_SHIFT))
    tag.shape = uint32(0)
    if job.kind == BLK_T_OUT and job.file_fd >= 0:
        offset = job.file_offset + int64(begin_bytes)
        if not file_io(job, record, tag.data, tag.length, offset, False):
            fail(job)
            return
    job.issued += uint64(1)
    put_request(ring, tag)


@kernel
def finish_chunk(tag, job, record):
    """A chunk came back: after an error no more are started, else what was read goes to the file."""
    if not check_status(tag, record):
        job.stopping = 1
        return
    if job.kind == BLK_T_IN and job.file_fd >= 0 and not job.file_failed:
        offset = job.file_offset + int64(tag.block * job.chunk_bytes)
        if not file_io(job, record, tag.data, tag.length, offset, True):
            fail(job)
            return
    record.done_bytes += tag.length


@kernel
def transfer(wait, ring, pollfds, tags, heads, job, record, directions, histograms):
    """Move the window: DONE, COMMAND or ERR_*. The arguments are those of driver_workload.drive.

    Also does a single flush or get-id: one chunk of that kind.
    """
    begin(wait, ring, job, record)
    for k in range(job.depth):
        if not tags[k].in_flight and may_issue_chunk(job):
            issue_chunk(ring, tags[k], job, record)
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
        for _ in range(used):
            index = take_used(ring, tags, heads)
            if index < 0:
                return index
            finish_chunk(tags[index], job, record)
            if may_issue_chunk(job):
                issue_chunk(ring, tags[index], job, record)
                show(ring, wait, record)
        record.ended_ns = monotonic_ns(wait.scratch)
        show(ring, wait, record)
    return ERR_FILE if job.file_failed else DONE
