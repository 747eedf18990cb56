"""Requests that are not done on the spot: by io_uring where there is one, else by a helper; and what ends them.

work: blk_work.BlockWork, in every kernel here.
"""

import numpy as np
from numba import int32, int64, uint64

from kernels import helper, helper_record, uring
from kernels import stage_layout as stage
from kernels.blk_answer import answer
from kernels.blk_bounce import copy_all
from kernels.blk_disk import BOUNCE_ROOM_BYTES, SEGMENTS_EACH
from kernels.blk_io import note_failure
from kernels.image_map import forget_marks
from kernels.jit import inlined, kernel
from kernels.memory import EAGAIN, ECANCELED, EFAULT, EINTR, EINVAL, EOPNOTSUPP
from kernels.request import (
    NOBODY,
    copy_rows,
    give_slot_back,
    next_waiting,
    room_of,
    take_slot,
    wait_for_helper,
)
from kernels.stages import lap
from kernels.status import ERR_IO, OK
from kernels.virtio_layout import (
    BLK_T_DISCARD,
    BLK_T_FLUSH,
    BLK_T_IN,
    BLK_T_OUT,
    BLK_T_WRITE_ZEROES,
    SECTOR_SHIFT,
)
from kernels.vring import hold

_SUBMIT_SHIFT = 2  # a quarter of what the disk has
_RWF_DSYNC = np.int32(2)  # preadv2(2)
_ZERO = np.uint64(0)
_ONE = np.uint64(1)


@kernel
def nobody_else(work):
    """Whether there is nobody to do requests but the worker itself."""
    return work.uring.fd < 0 and work.helpers.shape[0] == 0


@kernel
def start_helpers(work):
    """Give waiting requests to idle helpers."""
    index = 0
    while work.board.first_waiting != NOBODY and work.board.free_helpers > 0 and index < work.helpers.shape[0]:
        if helper.state_of(work.helpers, index) == helper_record.IDLE:
            work.board.free_helpers -= 1
            helper.give(work.helpers, index, next_waiting(work.board, work.requests))
        index += 1


@kernel
def registered(work, first, rows):
    """The registered buffer that holds segments[first:first + rows]; -1: none does, or there are several segments."""
    buffers = work.buffers
    if rows != 1 or buffers.shape[0] == 0:
        return int64(-1)
    address = work.segments[first, 0]
    low = 0
    high = buffers.shape[0]
    while low < high:
        middle = (low + high) >> 1
        if buffers[middle, 0] <= address:
            low = middle + 1
        else:
            high = middle
    if low == 0:
        return int64(-1)
    inside = address - buffers[low - 1, 0]
    size = buffers[low - 1, 1]
    fits = inside < size and work.segments[first, 1] <= size - inside
    return int64(low - 1) if fits else int64(-1)


@kernel
def bounce_room(work, slot):
    """Address of the slot's memory that io_uring takes, whatever guest memory is."""
    return work.disk.bounce_rooms + uint64(slot) * uint64(BOUNCE_ROOM_BYTES)


@kernel
def has_bounce_room(work, slot):
    """Whether there is one that is large enough for the request and those merged into it."""
    return work.disk.bounce_rooms != _ZERO and work.requests[slot].whole_length <= uint64(BOUNCE_ROOM_BYTES)


@kernel
def push(work, slot):
    """Queue a request for io_uring. False when that does not do its kind, or has no room."""
    request = work.requests[slot]
    fd = int32(work.disk.fd)
    if uring.polls(work.uring) and request.kind != BLK_T_IN and (request.kind == BLK_T_FLUSH or request.write_through):
        return False
    if request.kind == BLK_T_FLUSH:
        return uring.push_fsync(work.uring, fd, uint64(slot))
    if request.kind not in (BLK_T_IN, BLK_T_OUT):
        return False
    writing = request.kind == BLK_T_OUT
    flags = _RWF_DSYNC if writing and request.write_through else int32(0)
    offset = request.sector << uint64(SECTOR_SHIFT)
    first = room_of(slot)
    request.bounced = work.disk.bounces
    if request.bounced:
        if not has_bounce_room(work, slot):
            return False
        room = bounce_room(work, slot)
        if writing:
            copy_all(work.segments, first, request.whole_end, room, True)
        length = request.whole_length
        return uring.push_block(work.uring, writing, fd, room, length, offset, flags, -1, uint64(slot))
    rows = request.whole_end - first
    return uring.push_rw(
        work.uring,
        writing,
        fd,
        uint64(work.segments.ctypes.data) + uint64(16) * uint64(first),
        rows,
        request.whole_length,
        offset,
        flags,
        registered(work, first, rows),
        uint64(slot),
    )


@kernel
def disk_is_idle(work, slot):
    """Whether to submit the request of `slot`, just queued, now: so the disk works while the ones behind it are taken.

    The more it has to do already, the more go by one system call. What goes to the page cache waits for the end of the
    turn: it makes no disk work.
    """
    disk = work.disk
    to_the_disk = disk.direct or (disk.map_address != _ZERO and work.requests[slot].kind == BLK_T_IN)
    return to_the_disk and work.uring.queued > work.uring.in_flight >> _SUBMIT_SHIFT


@kernel
def hand_on(work, slot):
    """Have somebody do the request of `slot`, and those merged into it."""
    if work.uring.fd >= 0 and push(work, slot):
        if disk_is_idle(work, slot):
            uring.submit(work.uring, 0)
        return
    wait_for_helper(work.board, work.requests, slot)
    start_helpers(work)


@kernel
def hand_on_open(work):
    """Nothing more is merged into the request that was kept open."""
    slot = work.board.open
    if slot != NOBODY:
        work.board.open = NOBODY
        hand_on(work, slot)
        lap(work.board, stage.HAND_ON)


@kernel
def keep_rows(work, slot):
    """Copy the rows of a request, the first one to be merged: who does all of them cuts the rows as far as he gets.

    The copy lies where others have what they log; what is logged is not merged.
    """
    copy_rows(work.segments, room_of(slot) + SEGMENTS_EACH, room_of(slot), work.requests[slot].end)


@kernel
def bring_rows_back(work, slot):
    """Undo what was done to the rows of a request since keep_rows."""
    kept = room_of(slot) + SEGMENTS_EACH
    copy_rows(work.segments, room_of(slot), kept, kept + work.requests[slot].end - room_of(slot))


@kernel
def merge(work, slot):
    """Add the request of `slot` to the one that is kept open, if it follows that on the disk. True when it did."""
    leader = work.requests[work.board.open]
    request = work.requests[slot]
    rows = request.end - room_of(slot)
    if (
        leader.ring != request.ring
        or leader.kind != request.kind
        or leader.write_through != request.write_through
        or leader.sector + (leader.whole_length >> uint64(SECTOR_SHIFT)) != request.sector
        or leader.whole_length + request.length > work.disk.merge_bytes
        or leader.whole_end - room_of(work.board.open) + rows > SEGMENTS_EACH
    ):
        return False
    if work.board.open == leader.last_merged:
        keep_rows(work, work.board.open)
    leader.whole_end = copy_rows(work.segments, leader.whole_end, room_of(slot), request.end)
    leader.whole_length += request.length
    work.requests[leader.last_merged].merged = slot
    leader.last_merged = slot
    work.board.merges += _ONE
    return True


@inlined
def keep(work, ring, head, kind, sector, length, first, end, status_address, logged, logged_end):
    """Put the chain in hand into a slot, which is returned.

    Its data is segments[first:end], `length` bytes; segments[logged:logged_end] is what it writes, for the dirty log.
    """
    slot = take_slot(work.board, work.requests, ring)
    request = work.requests[slot]
    request.head = head
    request.status_address = status_address
    request.kind = kind
    request.sector = sector
    request.length = length
    request.end = copy_rows(work.segments, room_of(slot), first, end)
    request.logged_end = copy_rows(work.segments, room_of(slot) + SEGMENTS_EACH, logged, logged_end)
    return slot


@kernel
def do_later(work, ring, slot):
    """See that somebody does the request of `slot`, together with its neighbours on the disk if it has some."""
    request = work.requests[slot]
    request.write_through = ring.write_through
    request.whole_end = request.end
    request.whole_length = request.length
    request.last_merged = slot
    reads_or_writes = request.kind in (BLK_T_IN, BLK_T_OUT)
    mergeable = work.disk.merge_bytes != _ZERO and not ring.log_bytes and reads_or_writes
    if work.board.open != NOBODY:
        if mergeable and merge(work, slot):
            return
        hand_on_open(work)
    if mergeable:
        work.board.open = slot
    else:
        hand_on(work, slot)


@inlined
def end_one(work, slot, status):
    """Answer the request of `slot`, and free it."""
    request = work.requests[slot]
    ring = work.rings[request.ring]
    hold(ring, request)
    logged = room_of(slot) + SEGMENTS_EACH
    answer(
        work,
        ring,
        request.head,
        request.kind,
        request.length,
        request.status_address,
        logged,
        request.logged_end,
        status,
    )
    give_slot_back(work.board, work.requests, slot, ring)


@kernel
def end_whole(work, slot, status):
    """Answer the request of `slot` and those merged into it. Returns how many."""
    count = 0
    while slot != NOBODY:
        following = work.requests[slot].merged
        end_one(work, slot, status)
        slot = following
        count += 1
    return count


@kernel
def do_again(work, slot):
    """It was not done, or not all of it: a helper does it again, each of those merged by itself."""
    if work.requests[slot].merged != NOBODY:
        bring_rows_back(work, slot)
    while slot != NOBODY:
        request = work.requests[slot]
        following = request.merged
        request.merged = NOBODY
        request.last_merged = slot
        request.whole_end = request.end
        request.whole_length = request.length
        work.board.redone += _ONE
        wait_for_helper(work.board, work.requests, slot)
        slot = following
    start_helpers(work)


@kernel
def failed_for_good(kind, result):
    """Whether a result of io_uring is final: what a flush that failed was to save may be lost to the next one."""
    cannot = result in (-EINVAL, -EOPNOTSUPP, -EAGAIN, -EINTR, -ECANCELED)
    return kind == BLK_T_FLUSH and result < 0 and not cannot


@kernel
def collect_uring(work):
    """End what io_uring has done. Returns how many requests ended."""
    ended = 0
    count = uring.reap(work.uring, work.tokens, work.results)
    if count:
        lap(work.board, stage.COLLECT)
    for k in range(count):
        slot = int64(work.tokens[k])
        request = work.requests[slot]
        wanted = int64(0) if request.kind == BLK_T_FLUSH else int64(request.whole_length)
        if int64(work.results[k]) == wanted:
            if request.kind == BLK_T_IN and request.bounced:
                copy_all(work.segments, room_of(slot), request.whole_end, bounce_room(work, slot), False)
            ended += end_whole(work, slot, OK)
        elif failed_for_good(request.kind, int64(work.results[k])):
            note_failure(work.disk, -int64(work.results[k]))
            ended += end_whole(work, slot, int64(ERR_IO))
        else:
            if int64(work.results[k]) == -EFAULT:
                work.disk.bounces = 1  # such memory is copied from now on
            do_again(work, slot)
    return ended


@kernel
def collect_helpers(work):
    """End what helpers have done. Returns how many requests ended."""
    ended = 0
    for index in range(work.helpers.shape[0]):
        if helper.state_of(work.helpers, index) != helper_record.DONE:
            continue
        slot = helper.take_back(work.helpers, index)
        work.board.free_helpers += 1
        lap(work.board, stage.COLLECT)
        status = work.requests[slot].status
        if status != OK and work.requests[slot].merged != NOBODY:
            do_again(work, slot)
        else:
            if work.requests[slot].kind in (BLK_T_DISCARD, BLK_T_WRITE_ZEROES):
                forget_marks(work.disk)  # there may be holes now
            ended += end_whole(work, slot, status)
    start_helpers(work)
    return ended


@kernel
def collect(work):
    """End whatever is done by now. Returns how many requests ended; their rings are not published yet."""
    ended = 0
    if work.uring.fd >= 0:
        if uring.submit(work.uring, 0) > 0:
            lap(work.board, stage.HAND_ON)
        ended += collect_uring(work)
    if work.board.free_helpers < work.helpers.shape[0]:
        ended += collect_helpers(work)
    return ended
