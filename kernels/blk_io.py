"""What a virtio-blk request does to the image: read, write, flush, get-id, on an open file."""

import numpy as np
from numba import int32, int64, uint64

from kernels.blk_bounce import bounce_transfer
from kernels.blk_request import total_bytes
from kernels.jit import kernel
from kernels.memory import (
    EFAULT,
    EINTR,
    EINVAL,
    copy_bytes,
    last_errno,
    libc_fdatasync,
    libc_preadv,
    libc_pwritev,
    load_u64,
)
from kernels.status import ERR_BAD_REQUEST, ERR_IO, OK
from kernels.virtio_layout import BLK_ID_BYTES, SECTOR_BYTES, SECTOR_SHIFT

#: The image as its worker keeps it.
DISK = np.dtype(
    [
        ("fd", "<i8"),
        ("capacity_sectors", "<u8"),
        ("read_only", "<i8"),
        ("map_address", "<u8"),  # the file mapped into this process; 0: read it by system call
        ("map_start", "<u8"),  # where the mapping lies, also when it is no longer used
        ("map_bytes", "<u8"),
        ("id_address", "<u8"),  # BLK_ID_BYTES of serial, zero-padded
        ("bus_errors", "<u8"),  # address of control_block.WORKER.bus_errors
        ("bounce_address", "<u8"),  # blk_bounce.BOUNCE_BYTES of this process
        ("bounces", "<i8"),  # 1: the kernel refused guest memory once, so do not try again
        ("direct", "<i8"),  # 1: opened with O_DIRECT, which not every piece of guest memory is aligned for
        ("unsafe", "<i8"),  # 1: a flush does nothing (--cache unsafe)
        ("is_block", "<i8"),  # 1: a block device
        ("can_discard", "<i8"),  # what the file can do (devices/block/image_limits)
        ("can_write_zeroes", "<i8"),
        ("can_punch", "<i8"),
        ("can_zero_range", "<i8"),
        ("zeros_address", "<u8"),  # zeros_bytes of zeros
        ("zeros_bytes", "<u8"),
        ("waited", "<i8"),  # set to 1 by whatever may have waited for the disk
    ]
)

_IOV_MAX = 1024  # limits.h: segments in one preadv
#: Above this a system call is as fast as a copy and reads ahead by itself.
_COPY_MAX_BYTES = np.uint64(256 << 10)
_ZERO = np.uint64(0)


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
def transfer(disk, segments, first, end, offset, writing):
    """preadv or pwritev until all of segments[first:end] is done. OK or ERR_IO (error, or end of file)."""
    disk.waited = 1
    fd = int32(disk.fd)
    while first < end:
        if disk.bounces:
            return bounce_transfer(fd, disk.bounce_address, segments, first, end, offset, writing)
        iovec = uint64(segments.ctypes.data) + uint64(16) * uint64(first)
        parts = int32(min(end - first, _IOV_MAX))
        done = libc_pwritev(fd, iovec, parts, offset) if writing else libc_preadv(fd, iovec, parts, offset)
        if done < 0 and last_errno() == EINTR:
            continue
        if done < 0 and last_errno() == EFAULT:
            disk.bounces = 1
            continue
        if done < 0 and last_errno() == EINVAL and disk.direct:
            return bounce_transfer(fd, disk.bounce_address, segments, first, end, offset, writing)
        if done <= 0:
            return ERR_IO
        offset += done
        first = skip_segments(segments, first, uint64(done))
    return OK


@kernel
def copy_from_map(disk, segments, first, end, offset):
    """Copy out of the mapped image. OK, or ERR_IO when a page of it is gone: then read by system call."""
    before = load_u64(disk.bus_errors)
    source = disk.map_address + offset
    for k in range(first, end):
        copy_bytes(segments[k, 0], source, segments[k, 1])
        source += segments[k, 1]
    return OK if load_u64(disk.bus_errors) == before else ERR_IO


@kernel
def read_sectors(disk, segments, first, end, sector):
    """Read the image into segments[first:end]. Returns (OK or ERR_*, bytes read)."""
    length = total_bytes(segments, first, end)
    status = check_range(disk, sector, length)
    if status != OK:
        return status, _ZERO
    offset = sector << uint64(SECTOR_SHIFT)
    if disk.map_address != _ZERO and length <= _COPY_MAX_BYTES and offset + length <= disk.map_bytes:
        if copy_from_map(disk, segments, first, end, offset) == OK:
            return OK, length
        disk.map_address = _ZERO
    status = transfer(disk, segments, first, end, int64(offset), False)
    return status, length if status == OK else _ZERO


@kernel
def write_sectors(disk, segments, first, end, sector, write_through):
    """Write segments[first:end] to the image. Returns (OK or ERR_*, bytes written)."""
    length = total_bytes(segments, first, end)
    status = check_range(disk, sector, length)
    if status != OK or disk.read_only:
        return ERR_BAD_REQUEST, _ZERO
    status = transfer(disk, segments, first, end, int64(sector << uint64(SECTOR_SHIFT)), True)
    if status == OK and write_through:
        status = flush(disk)
    return status, length if status == OK else _ZERO


@kernel
def flush(disk):
    """Everything written is on the disk when this returns OK (virtio 1.2, 5.2.6.2)."""
    if disk.unsafe:
        return OK
    disk.waited = 1
    return OK if libc_fdatasync(int32(disk.fd)) == 0 else ERR_IO


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
