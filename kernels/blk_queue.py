"""Serving one vring of a block device: take chains, do the requests, give them back."""

import numpy as np
from numba import int32, uint8

from kernels import control_block as cb
from kernels.blk_io import flush, get_id, read_sectors, write_sectors
from kernels.blk_lookahead import AHEAD, look_ahead
from kernels.blk_request import parse_request
from kernels.chain import read_chain
from kernels.jit import kernel
from kernels.memory import ring_eventfd, store_u8
from kernels.split_ring import call_if_wanted, count_available, next_head, publish, put_used, set_state
from kernels.status import ERR_BAD_ADDRESS, ERR_NO_STATUS, ERR_UNSUPPORTED, OK
from kernels.virtio_layout import (
    BLK_S_IOERR,
    BLK_S_OK,
    BLK_S_UNSUPP,
    BLK_T_FLUSH,
    BLK_T_GET_ID,
    BLK_T_IN,
    BLK_T_OUT,
)

#: Requests done by copying alone are shown to the driver in groups: the line of used.idx changes hands less often.
_PUBLISH_EVERY = 8
#: Requests of one vring before the next vring has its turn.
TURN = 128

_ZERO = np.uint64(0)
_ONE = np.uint64(1)


@kernel
def break_ring(ring, error, one_address):
    """The driver broke the ring: stop serving it and ring its err doorbell (SET_VRING_ERR)."""
    ring.error = int32(error)
    publish(ring)
    set_state(ring, cb.VRING_BROKEN)
    if ring.err_fd >= 0:
        ring_eventfd(ring.err_fd, one_address)


@kernel
def perform(ring, disk, segments, kind, sector, read_first, read_end, write_first, write_end):
    """Do a parsed request. Returns (OK or ERR_*, bytes written into guest memory)."""
    if kind == BLK_T_IN:
        status, length = read_sectors(disk, segments, write_first, write_end, sector)
        ring.read_bytes += length
        return status, length
    if kind == BLK_T_OUT:
        status, length = write_sectors(disk, segments, read_first, read_end, sector, ring.write_through)
        ring.written_bytes += length
        return status, _ZERO
    if kind == BLK_T_FLUSH:
        ring.flushes += _ONE
        return flush(disk), _ZERO
    if kind == BLK_T_GET_ID:
        return OK, get_id(disk, segments, write_first, write_end)
    return ERR_UNSUPPORTED, _ZERO


@kernel
def serve_chain(ring, disk, regions, segments, scratch, head):
    """Do the request at `head` and put it on the used ring. OK, or an ERR_* that breaks the ring."""
    status, readable, count, clean = read_chain(ring, regions, head, segments)
    if status != OK:
        return status
    status, kind, sector, read_first, read_end, write_first, write_end, status_address = parse_request(
        segments, readable, count, scratch
    )
    if status == ERR_NO_STATUS:
        return status
    written = _ZERO
    if not clean:
        status = ERR_BAD_ADDRESS
    if status == OK:
        status, written = perform(ring, disk, segments, kind, sector, read_first, read_end, write_first, write_end)
    ring.requests += _ONE
    if status == OK:
        store_u8(status_address, uint8(BLK_S_OK))
    else:
        ring.errors += _ONE
        store_u8(status_address, uint8(BLK_S_UNSUPP if status == ERR_UNSUPPORTED else BLK_S_IOERR))
    put_used(ring, head, written + _ONE)
    return OK


@kernel
def serve_ring(ring, disk, regions, segments, scratch, one_address):
    """Serve what is available, at most TURN requests. Returns how many were done."""
    available = count_available(ring)
    if available == 0:
        return np.int64(0)
    done = np.int64(0)
    unpublished = 0
    error = np.int64(min(available, 0))
    while error == OK and done < available and done < TURN:
        if done % AHEAD == 0 and available - done > 1:
            look_ahead(ring, disk, regions, min(available - done, AHEAD))
        head = next_head(ring)
        if head < 0:
            error = head
            break
        error = np.int64(serve_chain(ring, disk, regions, segments, scratch, head))
        if error != OK:
            break
        done += 1
        unpublished += 1
        # Who waited for the disk should not wait for the requests behind it as well.
        if unpublished == _PUBLISH_EVERY or disk.waited:
            disk.waited = 0
            publish(ring)
            call_if_wanted(ring, one_address)
            unpublished = 0
    if unpublished:
        publish(ring)
        call_if_wanted(ring, one_address)
    if error != OK:
        break_ring(ring, error, one_address)
        return done + 1
    return done
