"""Discard and write-zeroes: requests that name ranges of the disk instead of bringing data (virtio 1.2, 5.2.6)."""

import numpy as np
from numba import int32, int64, uint64

from kernels.blk_io import check_range, flush, give_up
from kernels.blk_request import take_bytes, total_bytes
from kernels.jit import kernel
from kernels.memory import (
    EINTR,
    EOPNOTSUPP,
    last_errno,
    libc_fallocate,
    libc_ioctl,
    libc_pwrite,
    load_u32,
    load_u64,
    store_u64,
)
from kernels.status import ERR_BAD_REQUEST, ERR_IO, ERR_UNSUPPORTED, OK
from kernels.virtio_layout import BLK_RANGE_F_UNMAP, BLK_RANGE_SIZE, RANGE_SECTORS_MAX, RANGES_MAX, SECTOR_SHIFT

_FALLOC_KEEP_SIZE = np.int32(1)  # fallocate(2)
_FALLOC_PUNCH_HOLE = np.int32(2)
_FALLOC_ZERO_RANGE = np.int32(16)
_BLKDISCARD = np.uint64(0x1277)  # <linux/fs.h>: _IO(0x12, 119), of uint64[2]: start, length
_ZERO = np.uint64(0)
_ONE = np.uint64(1)
_RANGE_BYTES = np.uint64(BLK_RANGE_SIZE)


@kernel
def allocate(disk, mode, offset, length):
    """fallocate on the image. OK or ERR_IO."""
    disk.waited = 1
    while libc_fallocate(int32(disk.fd), int32(_FALLOC_KEEP_SIZE | mode), int64(offset), int64(length)) != 0:
        if last_errno() != EINTR:
            return ERR_IO
    return OK


@kernel
def write_zero_bytes(disk, offset, length):
    """Zeros by writing them, for a file that cannot do better. OK or ERR_IO."""
    disk.waited = 1
    while length > _ZERO:
        done = libc_pwrite(int32(disk.fd), disk.zeros_address, min(length, disk.zeros_bytes), int64(offset))
        if done < 0 and last_errno() == EINTR:
            continue
        if done <= 0:
            return give_up(disk, done)
        offset += uint64(done)
        length -= uint64(done)
    return OK


@kernel
def discard_range(disk, offset, length, scratch):
    """Give the range back to whatever stores it; of a block device whole logical blocks only. OK or ERR_IO."""
    if not disk.is_block:
        return allocate(disk, _FALLOC_PUNCH_HOLE, offset, length)
    mask = disk.logical_bytes - _ONE
    start, end = (offset + mask) & ~mask, (offset + length) & ~mask
    if start >= end:
        return OK
    disk.waited = 1
    store_u64(scratch, start)
    store_u64(scratch + uint64(8), end - start)
    return OK if libc_ioctl(int32(disk.fd), _BLKDISCARD, scratch) == 0 else ERR_IO


@kernel
def zero_range(disk, offset, length, unmap):
    """Zeros in the range, with its blocks given back if the driver allows that and the file can. OK or ERR_IO.

    To give them back is allowed, not asked for (5.2.6.2): what fails is done another way.
    """
    if unmap and disk.can_punch and allocate(disk, _FALLOC_PUNCH_HOLE, offset, length) == OK:
        return OK
    if disk.can_zero_range:
        if allocate(disk, _FALLOC_ZERO_RANGE, offset, length) == OK:
            return OK
        if last_errno() == EOPNOTSUPP:
            disk.can_zero_range = 0
    return write_zero_bytes(disk, offset, length)


@kernel
def do_ranges(disk, segments, first, end, scratch, zeroing):
    """Do each struct virtio_blk_discard_write_zeroes of the segments in turn. OK or ERR_*."""
    left = total_bytes(segments, first, end)
    if left == _ZERO or left % _RANGE_BYTES or left // _RANGE_BYTES > uint64(RANGES_MAX):
        return ERR_BAD_REQUEST
    while left > _ZERO:
        status, first = take_bytes(segments, first, end, scratch, _RANGE_BYTES)
        if status != OK:
            return status
        left -= _RANGE_BYTES
        sector = load_u64(scratch)
        sectors = uint64(load_u32(scratch + uint64(8)))
        flags = int64(load_u32(scratch + uint64(12)))
        # 5.2.6.2: reserved flags, and unmap in a discard, are UNSUPP.
        if flags & ~BLK_RANGE_F_UNMAP or (flags and not zeroing):
            return ERR_UNSUPPORTED
        length = sectors << uint64(SECTOR_SHIFT)
        if sectors > uint64(RANGE_SECTORS_MAX) or check_range(disk, sector, length) != OK:
            return ERR_BAD_REQUEST
        if sectors == _ZERO:
            continue
        offset = sector << uint64(SECTOR_SHIFT)
        if zeroing:
            status = zero_range(disk, offset, length, flags & BLK_RANGE_F_UNMAP)
        else:
            status = discard_range(disk, offset, length, scratch)
        if status != OK:
            return status
    return OK


@kernel
def discard(disk, segments, first, end, scratch, write_through):
    """VIRTIO_BLK_T_DISCARD. OK or ERR_*."""
    if not disk.can_discard:
        return ERR_UNSUPPORTED
    status = do_ranges(disk, segments, first, end, scratch, False)
    return flush(disk) if status == OK and write_through else status


@kernel
def write_zeroes(disk, segments, first, end, scratch, write_through):
    """VIRTIO_BLK_T_WRITE_ZEROES. OK or ERR_*."""
    if not disk.can_write_zeroes:
        return ERR_UNSUPPORTED
    status = do_ranges(disk, segments, first, end, scratch, True)
    return flush(disk) if status == OK and write_through else status
