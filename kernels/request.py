"""Requests that were taken and are under way: somebody else than the worker's loop does them, in any order.

Each has a slot in REQUEST[n] and, behind the segments of the chain in hand, room for a copy of its own segments, which
must stay until it is done.
"""

from numba import int64

from kernels.blk_disk import SEGMENTS_EACH
from kernels.jit import inlined, kernel
from kernels.request_record import NOBODY, REQUESTS_MAX, SEGMENTS_MAX


@kernel
def room_of(slot):
    """First row of a slot's own segments."""
    return int64(2 * SEGMENTS_MAX) + int64(slot) * int64(2 * SEGMENTS_EACH)


@inlined
def take_slot(board, requests, ring):
    """A free slot for the chain in hand of `ring`; there is one (`room`)."""
    slot = board.free
    request = requests[slot]
    board.free = request.next
    board.under_way += 1
    ring.under_way += 1
    request.ring = ring.index
    request.slots = ring.slots
    request.buffer_id = ring.buffer_id
    request.entry = ring.entry
    request.next = NOBODY
    request.merged = NOBODY
    return slot


@inlined
def give_slot_back(board, requests, slot, ring):
    """The request of the slot is done."""
    requests[slot].next = board.free
    board.free = slot
    board.under_way -= 1
    ring.under_way -= 1


@inlined
def room(board, ring):
    """How many more chains of the ring can be under way; 0: another must end first."""
    if ring.in_order and ring.under_way > 0:
        return int64(0)
    return min(int64(REQUESTS_MAX) - board.under_way, int64(REQUESTS_MAX // 2) - ring.under_way)


@inlined
def copy_rows(segments, to, first, end):
    """Copy rows of a segment list. Returns the end of the copy."""
    for k in range(first, end):
        segments[to, 0] = segments[k, 0]
        segments[to, 1] = segments[k, 1]
        to += 1
    return to


@kernel
def wait_for_helper(board, requests, slot):
    """Put a request at the end of the list."""
    requests[slot].next = NOBODY
    if board.first_waiting == NOBODY:
        board.first_waiting = slot
    else:
        requests[board.last_waiting].next = slot
    board.last_waiting = slot


@kernel
def next_waiting(board, requests):
    """Take the first request off the list; -1: none."""
    slot = board.first_waiting
    if slot != NOBODY:
        board.first_waiting = requests[slot].next
        requests[slot].next = NOBODY
    return slot
