"""What a virtio-blk request does to the image: read, write, flush, get-id, on an open file."""

import numpy as np
from numba import int32, int64, uint32, uint64

from kernels.blk_bounce import bounce_transfer
from kernels.blk_request import total_bytes
from kernels.jit import kernel
from kernels.memory import (
    EFAULT,
    EINTR,
    EINVAL,
    EOPNOTSUPP,
    add_u64,
    copy_bytes,
    last_errno,
    libc_fdatasync,
    libc_preadv,
    libc_preadv2,
    libc_pwritev,
    store_u32,
)
from kernels.status import ERR_BAD_REQUEST, ERR_IO, LATER, OK
from kernels.virtio_layout import BLK_ID_BYTES, SECTOR_BYTES, SECTOR_SHIFT

_IOV_MAX = 1024  # limits.h: segments in one preadv
_RWF_NOWAIT = np.int32(8)  # preadv2(2)
_ZERO = np.uint64(0)
_ONE = np.uint64(1)


@kernel
def check_range(disk, sector, length):
    """Whether `length` bytes from `sector` on are whole sectors inside the disk (virtio 1.2, 5.2.6.1)."""
    sectors = length >> uint64(SECTOR_SHIFT)
    if length & uint64(SECTOR_BYTES - 1):
        return ERR_BAD_REQUEST
    if sector > disk.capacity_sectors or sectors > disk.capacity_sectors - sector:
        return ERR_BAD_REQUEST
    return OK


@kernel
def skip_segments(segments, first, done):
    """Cut `done` bytes off the front of segments[first:]. Returns the first segment that is left."""
    while done > _ZERO:
        if segments[first, 1] > done:
            segments[first, 0] += done
            segments[first, 1] -= done
            return first
        done -= segments[first, 1]
        first += 1
    return first


@kernel
def note_failure(disk, errno):
    """Show the coordinator that a system call failed, and why."""
    store_u32(disk.disk_errno, uint32(errno))
    add_u64(disk.disk_errors, _ONE)


@kernel
def give_up(disk, done):
    """ERR_IO, for a system call that did nothing: it failed (`done` below 0), which is noted, or met the end."""
    if done < 0:
        note_failure(disk, last_errno())
    return ERR_IO


@kernel
def bounce(disk, segments, first, end, offset, writing):
    """bounce_transfer on the image. OK or ERR_IO."""
    status = bounce_transfer(int32(disk.fd), disk.bounce_address, segments, first, end, offset, writing)
    if status != OK:
        note_failure(disk, last_errno())
    return status


@kernel
def transfer(disk, segments, first, end, offset, writing):
    """preadv or pwritev until all of segments[first:end] is done. OK or ERR_IO (error, or end of file)."""
    disk.waited = 1
    fd = int32(disk.fd)
    while first < end:
        if disk.bounces:
            return bounce(disk, segments, first, end, offset, writing)
        iovec = uint64(segments.ctypes.data) + uint64(16) * uint64(first)
        parts = int32(min(end - first, _IOV_MAX))
        done = libc_pwritev(fd, iovec, parts, offset) if writing else libc_preadv(fd, iovec, parts, offset)
        if done < 0 and last_errno() == EINTR:
            continue
        if done < 0 and last_errno() == EFAULT:
            disk.bounces = 1
            continue
        if done < 0 and last_errno() == EINVAL and disk.direct:
            return bounce(disk, segments, first, end, offset, writing)
        if done <= 0:
            return give_up(disk, done)
        offset += done
        first = skip_segments(segments, first, uint64(done))
    return OK


@kernel
def read_at_once(disk, segments, first, end, offset, length):
    """preadv2 that does not wait for the disk. OK when all of it was in memory, else LATER."""
    iovec = uint64(segments.ctypes.data) + uint64(16) * uint64(first)
    if end - first > _IOV_MAX:
        return LATER
    done = libc_preadv2(int32(disk.fd), iovec, int32(end - first), int64(offset), _RWF_NOWAIT)
    if done < 0 and last_errno() == EOPNOTSUPP:
        disk.nowait = 0
    return OK if uint64(max(done, 0)) == length and length > _ZERO else LATER


@kernel
def read_sectors(disk, segments, first, end, sector):
    """Read the image into segments[first:end]; waits for the disk. OK or ERR_*."""
    length = total_bytes(segments, first, end)
    status = check_range(disk, sector, length)
    if status != OK:
        return status
    return transfer(disk, segments, first, end, int64(sector << uint64(SECTOR_SHIFT)), False)


@kernel
def write_sectors(disk, segments, first, end, sector, write_through):
    """Write segments[first:end] to the image; waits for the disk. OK or ERR_*."""
    length = total_bytes(segments, first, end)
    status = check_range(disk, sector, length)
    if status != OK or disk.read_only:
        return ERR_BAD_REQUEST
    status = transfer(disk, segments, first, end, int64(sector << uint64(SECTOR_SHIFT)), True)
    if status == OK and write_through:
        status = flush(disk)
    return status


@kernel
def flush(disk):
    """Everything written is on the disk when this returns OK (virtio 1.2, 5.2.6.2)."""
    if disk.unsafe:
        return OK
    disk.waited = 1
    if libc_fdatasync(int32(disk.fd)) == 0:
        return OK
    note_failure(disk, last_errno())
    return ERR_IO


@kernel
def get_id(disk, segments, first, end):
    """Copy the serial, at most 20 bytes (virtio 1.2, 5.2.6). Returns bytes written."""
    written = _ZERO
    for k in range(first, end):
        part = min(segments[k, 1], uint64(BLK_ID_BYTES) - written)
        if part == _ZERO:
            break
        copy_bytes(segments[k, 0], disk.id_address + written, part)
        written += part
    return written
