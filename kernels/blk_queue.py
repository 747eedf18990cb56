"""Serving one vring of a block device: take chains, do the requests, give them back."""

import numpy as np
from numba import uint8

from kernels import control_block as cb
from kernels.blk_io import flush, get_id, read_sectors, write_sectors
from kernels.blk_lookahead import AHEAD, look_ahead
from kernels.blk_ranges import discard, write_zeroes
from kernels.blk_request import parse_request
from kernels.chain import SEGMENTS_MAX
from kernels.dirty_log import mark_segments
from kernels.jit import kernel
from kernels.memory import ring_eventfd, store_u8
from kernels.status import ERR_BAD_ADDRESS, ERR_NO_STATUS, ERR_UNSUPPORTED, MISS, OK
from kernels.virtio_layout import (
    BLK_S_IOERR,
    BLK_S_OK,
    BLK_S_UNSUPP,
    BLK_T_DISCARD,
    BLK_T_FLUSH,
    BLK_T_GET_ID,
    BLK_T_IN,
    BLK_T_OUT,
    BLK_T_WRITE_ZEROES,
)
from kernels.vring import (
    break_ring,
    call_if_wanted,
    give_back,
    look_at_next,
    publish,
    publishes_each,
    set_state,
    take,
    waiting,
)

#: Requests done by copying alone are shown to the driver in groups: the line of used.idx changes hands less often.
_PUBLISH_EVERY = 8
#: Requests of one vring before the next vring has its turn.
TURN = 128

_ZERO = np.uint64(0)
_ONE = np.uint64(1)


@kernel
def perform(ring, disk, segments, scratch, kind, sector, read_first, read_end, write_first, write_end):
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
    if kind == BLK_T_DISCARD:
        return discard(disk, segments, read_first, read_end, scratch, ring.write_through), _ZERO
    if kind == BLK_T_WRITE_ZEROES:
        return write_zeroes(disk, segments, read_first, read_end, scratch, ring.write_through), _ZERO
    return ERR_UNSUPPORTED, _ZERO


@kernel
def keep_writable(segments, readable, count):
    """Keep a copy of segments[readable:count] behind the list: doing the request cuts them. Returns its end."""
    for k in range(readable, count):
        segments[SEGMENTS_MAX + k, 0] = segments[k, 0]
        segments[SEGMENTS_MAX + k, 1] = segments[k, 1]
    return SEGMENTS_MAX + count


@kernel
def serve_next(ring, disk, regions, memory, segments, copied, scratch):
    """Do the next request and put it on the used ring. OK, MISS, or an ERR_* that breaks the ring."""
    status, head, readable, count, clean = look_at_next(ring, regions, segments, copied)
    if status != OK:
        return np.int64(status)
    logged = keep_writable(segments, readable, count) if ring.log_bytes else 0
    status, kind, sector, read_first, read_end, write_first, write_end, status_address = parse_request(
        segments, readable, count, scratch
    )
    if status == ERR_NO_STATUS:
        return np.int64(status)
    taken = take(ring, head, copied)
    if taken != OK:
        return np.int64(taken)
    written = _ZERO
    if not clean:
        status = ERR_BAD_ADDRESS
    if status == OK:
        status, written = perform(
            ring, disk, segments, scratch, kind, sector, read_first, read_end, write_first, write_end
        )
    ring.requests += _ONE
    if status == OK:
        store_u8(status_address, uint8(BLK_S_OK))
    else:
        ring.errors += _ONE
        store_u8(status_address, uint8(BLK_S_UNSUPP if status == ERR_UNSUPPORTED else BLK_S_IOERR))
    if ring.log_bytes:
        mark_segments(ring, memory, segments, SEGMENTS_MAX + readable, logged)
    give_back(ring, memory, head, written + _ONE)
    return np.int64(OK)


@kernel
def wait_for_translation(ring, notice_fd, one_address):
    """Leave the ring until the coordinator has asked the front-end for the address that is lacking."""
    set_state(ring, cb.VRING_WAITING)
    ring_eventfd(notice_fd, one_address)


@kernel
def serve_ring(ring, disk, regions, memory, segments, copied, scratch, one_address, notice_fd):
    """Serve what is available, at most TURN requests. Returns how many were done."""
    available = waiting(ring)
    if available == 0:
        return np.int64(0)
    done = np.int64(0)
    unpublished = 0
    group = 1 if publishes_each(ring) else _PUBLISH_EVERY
    error = np.int64(min(available, 0))
    while error == OK and available > 0 and done < TURN:
        if done % AHEAD == 0 and available > 1 and not ring.packed and ring.resubmit_next == ring.resubmit_count:
            look_ahead(ring, disk, regions, min(available, AHEAD))
        error = serve_next(ring, disk, regions, memory, segments, copied, scratch)
        if error != OK:
            break
        done += 1
        unpublished += 1
        # Who waited for the disk should not wait for the requests behind it as well.
        if unpublished == group or disk.waited:
            disk.waited = 0
            publish(ring, one_address)
            call_if_wanted(ring, one_address)
            unpublished = 0
        available -= 1
        if available == 0:
            available = waiting(ring)
            error = np.int64(min(available, 0))
    if unpublished:
        publish(ring, one_address)
        call_if_wanted(ring, one_address)
    if error == MISS:
        wait_for_translation(ring, notice_fd, one_address)
    elif error != OK:
        break_ring(ring, error, one_address)
        return done + 1
    return done
