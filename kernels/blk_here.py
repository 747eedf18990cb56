"""What of a block request takes no waiting, and is done by the worker itself."""

import numpy as np
from numba import uint64

from kernels.blk_io import check_range, read_at_once
from kernels.image_map import can_copy
from kernels.jit import inlined
from kernels.status import COPY, ERR_BAD_REQUEST, ERR_UNSUPPORTED, LATER, OK
from kernels.virtio_layout import (
    BLK_T_DISCARD,
    BLK_T_FLUSH,
    BLK_T_IN,
    BLK_T_OUT,
    BLK_T_WRITE_ZEROES,
    SECTOR_SHIFT,
)

_ZERO = np.uint64(0)


@inlined
def read_here(disk, segments, first, end, sector, length):
    """A read, if it takes no waiting. OK, ERR_*, COPY or LATER."""
    status = check_range(disk, sector, length)
    if status != OK or length == _ZERO:
        return status
    offset = sector << uint64(SECTOR_SHIFT)
    if can_copy(disk, offset, length):
        return COPY
    if disk.nowait:
        return read_at_once(disk, segments, first, end, offset, length)
    return LATER


@inlined
def write_here(disk, sector, length, write_through):
    """A write, if it takes no waiting. OK, ERR_*, COPY or LATER."""
    status = check_range(disk, sector, length)
    if status != OK or disk.read_only:
        return ERR_BAD_REQUEST
    if length == _ZERO:
        return OK
    if write_through:
        return LATER
    if disk.map_writable and can_copy(disk, sector << uint64(SECTOR_SHIFT), length):
        return COPY
    return LATER


@inlined
def do_here(disk, segments, kind, sector, first, end, length, write_through):
    """Do a request on segments[first:end], `length` bytes, if that takes no waiting. OK, ERR_*, COPY or LATER."""
    if kind == BLK_T_IN:
        return read_here(disk, segments, first, end, sector, length)
    if kind == BLK_T_OUT:
        return write_here(disk, sector, length, write_through)
    if kind == BLK_T_FLUSH:
        return OK if disk.unsafe else LATER
    if kind in (BLK_T_DISCARD, BLK_T_WRITE_ZEROES):
        return LATER
    return ERR_UNSUPPORTED
