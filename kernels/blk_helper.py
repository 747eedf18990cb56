"""What a helper of a block worker does: one request from beginning to end, by system calls that wait."""

from numba import int32, uint32, uint64

from kernels.blk_io import flush, read_sectors, write_sectors
from kernels.blk_ranges import discard, write_zeroes
from kernels.helper import state_address
from kernels.helper_record import DONE, GIVEN
from kernels.jit import kernel
from kernels.memory import libc_read, load_acquire_u32, ring_eventfd, store_release_u32
from kernels.request import room_of
from kernels.status import ERR_UNSUPPORTED
from kernels.virtio_layout import BLK_T_DISCARD, BLK_T_FLUSH, BLK_T_IN, BLK_T_OUT, BLK_T_WRITE_ZEROES


@kernel
def perform(disk, segments, scratch, kind, sector, first, end, write_through):
    """Do a request on segments[first:end], which it cuts. Returns OK or ERR_*."""
    if kind == BLK_T_IN:
        return read_sectors(disk, segments, first, end, sector)
    if kind == BLK_T_OUT:
        return write_sectors(disk, segments, first, end, sector, write_through)
    if kind == BLK_T_FLUSH:
        return flush(disk)
    if kind == BLK_T_DISCARD:
        return discard(disk, segments, first, end, scratch, write_through)
    if kind == BLK_T_WRITE_ZEROES:
        return write_zeroes(disk, segments, first, end, scratch, write_through)
    return ERR_UNSUPPORTED


@kernel
def help_worker(helpers, index, requests, segments, disk):
    """The life of the helper at `index`. requests: REQUEST[n]; segments: the worker's; disk: the helper's own DISK.

    Never returns: the thread ends with its process.
    """
    helper = helpers[index]
    while True:
        if libc_read(int32(helper.wake_fd), helper.scratch, uint64(8)) != 8:
            continue
        if load_acquire_u32(state_address(helpers, index)) != GIVEN:
            continue
        request = requests[helper.slot]
        request.status = perform(
            disk,
            segments,
            helper.scratch,
            request.kind,
            request.sector,
            room_of(helper.slot),
            request.whole_end,
            request.write_through,
        )
        store_release_u32(state_address(helpers, index), uint32(DONE))
        ring_eventfd(int32(helper.done_fd), helper.one)
