"""Serving one vring of a block device: take chains, do what takes no waiting, have somebody do the rest.

work: blk_work.BlockWork, in every kernel here.
"""

import numpy as np
from numba import int64, uint64

from kernels import control_block as cb
from kernels import stage_layout as stage
from kernels.blk_answer import answer
from kernels.blk_disk import SEGMENTS_EACH
from kernels.blk_group import serve_group
from kernels.blk_helper import perform
from kernels.blk_here import do_here
from kernels.blk_io import get_id
from kernels.blk_later import collect, do_later, hand_on_open, keep, nobody_else
from kernels.blk_request import parse_request, total_bytes
from kernels.image_map import copy_through_map
from kernels.jit import inlined, kernel
from kernels.memory import prefetch_write, ring_eventfd
from kernels.request import copy_rows, room
from kernels.request_record import SEGMENTS_MAX
from kernels.stages import lap
from kernels.status import COPY, ERR_BAD_ADDRESS, ERR_NO_STATUS, LATER, MISS, OK
from kernels.usual_chain import group_size
from kernels.virtio_layout import BLK_T_GET_ID, BLK_T_IN, BLK_T_OUT, SECTOR_SHIFT
from kernels.vring import (
    break_ring,
    call_if_wanted,
    fetch_used,
    look_at_next,
    publish,
    set_state,
    take,
    tell_under_way,
    waiting,
)

#: What is done is shown to the driver in groups: the line of used.idx changes hands less often.
_PUBLISH_EVERY = 8
#: Requests of one vring before the next vring has its turn.
TURN = 128

_ZERO = np.uint64(0)
_ONE = np.uint64(1)


@inlined
def serve_next(work, ring):
    """Do the next request, whatever it is, or have somebody do it. OK, MISS, or an ERR_* that breaks the ring."""
    segments = work.segments
    status, head, readable, count, clean = look_at_next(ring, work.regions, segments, work.copied)
    if status != OK:
        return np.int64(status)
    # Doing a request cuts its segments, so the log needs a copy of them.
    logged = SEGMENTS_MAX + readable
    logged_end = copy_rows(segments, int64(logged), readable, count) if ring.log_bytes else int64(logged)
    status, kind, sector, read_first, read_end, write_first, write_end, status_address = parse_request(
        segments, readable, count, work.scratch
    )
    if status == ERR_NO_STATUS:
        return np.int64(status)
    lap(work.board, stage.PARSE)
    taken = take(ring, head, work.copied, int64(0))
    if taken != OK:
        return np.int64(taken)
    lap(work.board, stage.TAKE)
    first, end = (write_first, write_end) if kind == BLK_T_IN else (read_first, read_end)
    length = _ZERO
    step = stage.DO
    if not clean:
        status = ERR_BAD_ADDRESS
    elif status == OK:
        if kind == BLK_T_GET_ID:
            length = get_id(work.disk, segments, write_first, write_end)
        else:
            length = total_bytes(segments, first, end)
            status = do_here(work.disk, segments, kind, sector, first, end, length, ring.write_through)
        if status == COPY:
            offset = sector << uint64(SECTOR_SHIFT)
            status = copy_through_map(work.disk, segments, first, end, offset, length, kind == BLK_T_OUT, _ZERO, _ZERO)
            step = stage.COPY
            if status != OK:
                status = LATER
    if status == LATER:
        short = end - first <= SEGMENTS_EACH and logged_end - logged <= SEGMENTS_EACH
        if short and not nobody_else(work):
            slot = keep(work, ring, head, kind, sector, length, first, end, status_address, logged, logged_end)
            lap(work.board, stage.KEEP)
            do_later(work, ring, slot)
            lap(work.board, stage.HAND_ON)
            return np.int64(OK)
        status = perform(work.disk, segments, work.scratch, kind, sector, first, end, ring.write_through)
    lap(work.board, step)
    answer(work, ring, head, kind, length, status_address, logged, logged_end, status)
    lap(work.board, stage.ANSWER)
    return np.int64(OK)


@kernel
def wait_for_translation(work, ring):
    """Leave the ring until the coordinator has asked the front-end for the address that is lacking."""
    set_state(ring, cb.VRING_WAITING)
    ring_eventfd(work.notice_fd, work.one)


@inlined
def show(work, ring):
    """Show the driver what was given back, and call it if it wants that."""
    publish(ring, work.one)
    lap(work.board, stage.PUBLISH)
    call_if_wanted(ring, work.one)
    lap(work.board, stage.CALL)


@kernel
def serve_ring(work, ring):
    """Serve what is available, at most TURN requests. Returns how many were taken."""
    ring.blocked = 0
    available = waiting(ring)
    if available == 0:
        return np.int64(0)
    done = np.int64(0)
    error = np.int64(min(available, 0))
    if available > 0:
        ring.turns += _ONE
        ring.waiting_sum += uint64(available)
        if available == 1:
            prefetch_write(ring.header)
            fetch_used(ring)
        lap(work.board, stage.FIND)
    while error == OK and available > 0 and done < TURN:
        places = room(work.board, ring)
        if places <= 0:
            ring.blocked = 1
            break
        some = np.int64(0)
        if ring.resubmit_next == ring.resubmit_count and not ring.log_bytes:
            some, error = serve_group(work, ring, min(group_size(ring, available), places, TURN - done))
        if some == 0 and error == OK:
            error = serve_next(work, ring)
            some = np.int64(error == OK)
        done += some
        # Who waited for the disk should not wait for the requests behind it as well.
        if ring.unpublished >= _PUBLISH_EVERY or work.disk.waited:
            work.disk.waited = 0
            show(work, ring)
        available -= some
        if available <= 0 and error == OK:
            available = waiting(ring)
            error = np.int64(min(available, 0))
    hand_on_open(work)
    tell_under_way(ring)
    if ring.unpublished:
        show(work, ring)
    if error == MISS:
        wait_for_translation(work, ring)
    elif error != OK:
        break_ring(ring, error, work.one)
        return done + 1
    return done


@kernel
def end_some(work):
    """End what was under way and is done by now, and show it. Returns how many requests ended."""
    ended = collect(work)
    if ended:
        lap(work.board, stage.ANSWER)
        for k in range(work.rings.shape[0]):
            work.rings[k].blocked = 0  # there may be room: whoever wants to sleep looks at it
            if work.rings[k].unpublished:
                show(work, work.rings[k])
    return ended
