"""Answering a request of a block device: its status, the counters, the dirty-page log, the used ring."""

import numpy as np
from numba import uint8

from kernels.dirty_log import mark_segments
from kernels.jit import inlined
from kernels.memory import load_u64, store_u8
from kernels.status import ERR_UNSUPPORTED, OK
from kernels.virtio_layout import (
    BLK_S_IOERR,
    BLK_S_OK,
    BLK_S_UNSUPP,
    BLK_T_FLUSH,
    BLK_T_GET_ID,
    BLK_T_IN,
    BLK_T_OUT,
)
from kernels.vring import give_back

_ZERO = np.uint64(0)
_ONE = np.uint64(1)


@inlined
def count_done(ring, kind, length):
    """A request of `length` bytes went well. Returns the bytes that it wrote into guest memory."""
    if kind == BLK_T_IN:
        ring.read_bytes += length
        return length
    if kind == BLK_T_OUT:
        ring.written_bytes += length
    elif kind == BLK_T_FLUSH:
        ring.flushes += _ONE
    return length if kind == BLK_T_GET_ID else _ZERO


@inlined
def answer(work, ring, head, kind, length, status_address, logged, logged_end, status):
    """Write the status and give the chain back. segments[logged:logged_end]: what the request wrote, for the log.

    Unless guest memory has lost a page, maybe with what was read, written or answered: then nobody hears of anything.
    """
    written = _ZERO
    if status == OK:
        store_u8(status_address, uint8(BLK_S_OK))
    else:
        store_u8(status_address, uint8(BLK_S_UNSUPP if status == ERR_UNSUPPORTED else BLK_S_IOERR))
    if load_u64(work.disk.memory_errors) != _ZERO:
        return
    ring.requests += _ONE
    if status == OK:
        written = count_done(ring, kind, length)
    else:
        ring.errors += _ONE
    if ring.log_bytes:
        mark_segments(ring, work.memory, work.segments, logged, logged_end)
    give_back(ring, work.memory, head, written + _ONE)
