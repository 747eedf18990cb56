"""A vring of either layout: what is available, which chain comes next, giving it back, who must be woken.

The layouts themselves are in split_ring and packed_ring; what both share, and the choice between them, is here.
"""

import numpy as np
from numba import int32, int64, uint16, uint32, uint64

from kernels import control_block as cb
from kernels import dirty_log, inflight_packed, inflight_split, packed_ring, split_ring
from kernels.chain import note_miss, read_chain
from kernels.jit import inlined, kernel
from kernels.memory import (
    load_u64,
    prefetch,
    prefetch_write,
    ring_eventfd,
    store_release_u32,
    store_u16,
    store_u32,
    store_u64,
)
from kernels.regions import contiguous, contiguous_user, locate
from kernels.status import ERR_HEAD_INDEX, ERR_INFLIGHT, ERR_QUEUE_SIZE, ERR_RING_ADDRESS, MISS, OK
from kernels.virtio_layout import (
    ACCESS_BOTH,
    ACCESS_READ,
    ACCESS_WRITE,
    DESC_SIZE,
    EVENT_BYTES,
    QUEUE_SIZE_MAX,
    USED_ELEM_SIZE,
    USED_IDX,
)

_STATE = np.uint64(cb.offset_of(cb.VRING, "state"))
_ERROR = np.uint64(cb.offset_of(cb.VRING, "error"))
_LAST_AVAIL = np.uint64(cb.offset_of(cb.VRING, "last_avail_idx"))
_USED_IDX = np.uint64(cb.offset_of(cb.VRING, "used_idx"))
_REQUESTS = np.uint64(cb.offset_of(cb.VRING, "requests"))
_ERRORS = np.uint64(cb.offset_of(cb.VRING, "errors"))
_READ_BYTES = np.uint64(cb.offset_of(cb.VRING, "read_bytes"))
_WRITTEN_BYTES = np.uint64(cb.offset_of(cb.VRING, "written_bytes"))
_FLUSHES = np.uint64(cb.offset_of(cb.VRING, "flushes"))
_KICKS = np.uint64(cb.offset_of(cb.VRING, "kicks"))
_CALLS = np.uint64(cb.offset_of(cb.VRING, "calls"))
_UNDER_WAY = np.uint64(cb.offset_of(cb.VRING, "under_way"))
_TURNS = np.uint64(cb.offset_of(cb.VRING, "turns"))
_WAITING_SUM = np.uint64(cb.offset_of(cb.VRING, "waiting_sum"))

_ZERO = np.uint64(0)
_ONE = np.uint64(1)
_SIX = np.uint64(6)


@kernel
def place_part(ring, memory, translations, address, length, access):
    """(OK, MISS or ERR_RING_ADDRESS; where `length` bytes of the ring are here). Addresses: see `place_ring`."""
    if not ring.iotlb:
        here = contiguous_user(memory, address, length)
        return (OK, here) if here != _ZERO else (ERR_RING_ADDRESS, _ZERO)
    here = contiguous(translations, address, length, access)
    if here != _ZERO:
        return OK, here
    done = _ZERO
    while done < length:
        here, available = locate(translations, address + done, length - done, access)
        if here == _ZERO:
            if available == _ZERO:
                note_miss(ring, address + done, access)
                return MISS, _ZERO
            return ERR_RING_ADDRESS, _ZERO
        done += available
    return ERR_RING_ADDRESS, _ZERO  # all of it is known, but it does not lie in one piece


@kernel
def place_ring(ring, memory, translations, desc, avail, used):
    """Translate and check the three parts of a ring (virtio 1.2, 2.7 and 2.8.10.1: alignment). OK, MISS or ERR_*.

    desc, avail, used: front-end user addresses, found in `memory`; driver addresses, found in `translations`, with an
    IOTLB. used_event and avail_event are part of the areas even when EVENT_IDX is off (2.7.6, 2.7.8).
    """
    size = uint64(ring.size)
    if size == _ZERO or size > uint64(QUEUE_SIZE_MAX):
        return ERR_QUEUE_SIZE
    if not ring.packed and size & (size - _ONE):
        return ERR_QUEUE_SIZE
    avail_bytes = uint64(EVENT_BYTES) if ring.packed else _SIX + uint64(2) * size
    used_bytes = uint64(EVENT_BYTES) if ring.packed else _SIX + uint64(USED_ELEM_SIZE) * size
    avail_align = uint64(3) if ring.packed else _ONE
    if desc & uint64(15) or avail & avail_align or used & uint64(3):
        return ERR_RING_ADDRESS
    desc_access = ACCESS_BOTH if ring.packed else ACCESS_READ
    status, desc_here = place_part(ring, memory, translations, desc, size * uint64(DESC_SIZE), desc_access)
    if status != OK:
        return status
    status, avail_here = place_part(ring, memory, translations, avail, avail_bytes, ACCESS_READ)
    if status != OK:
        return status
    status, used_here = place_part(ring, memory, translations, used, used_bytes, ACCESS_WRITE)
    if status != OK:
        return status
    ring.desc = desc_here
    ring.avail = avail_here
    ring.used = used_here
    return OK


@kernel
def set_state(ring, state):
    """Change the ring's state, here and in the control block."""
    ring.state = int32(state)
    store_u16(ring.record + _LAST_AVAIL, ring.last_avail_idx)
    store_u16(ring.record + _USED_IDX, ring.used_idx)
    store_u32(ring.record + _ERROR, uint32(ring.error))
    store_release_u32(ring.record + _STATE, uint32(state))


@kernel
def waiting(ring):
    """How many chains are there to take, at least (a packed ring does not tell); negative: ERR_AVAIL_IDX."""
    if ring.resubmit_next < ring.resubmit_count:
        return ring.resubmit_count - ring.resubmit_next
    if ring.packed:
        return int64(packed_ring.has_available(ring))
    return split_ring.count_available(ring)


@kernel
def look_at_next(ring, regions, segments, copied):
    """Read the next chain, which stays untaken.

    Returns (OK, MISS or ERR_*; its head; readable segments; all segments; 1 when every byte of it is mapped).
    """
    again = ring.resubmit_next < ring.resubmit_count
    head = int64(0)
    if again:
        head = int64(load_u64(ring.resubmit + uint64(8) * uint64(ring.resubmit_next)))
        if head >= ring.size:
            return ERR_HEAD_INDEX, int64(0), int64(0), int64(0), 0
    if ring.packed:
        if again:
            length = inflight_packed.copy_inflight(ring, head, copied)
        else:
            length = packed_ring.copy_chain(ring, ring.last_avail_idx, copied, int64(0), ring.size)
        if length < 0:
            return length, int64(0), int64(0), int64(0), 0
        status, readable, count, clean = packed_ring.read_copied(ring, regions, copied, length, segments)
        return status, head, readable, count, clean
    if not again:
        head = split_ring.next_head(ring)
        if head < 0:
            return head, int64(0), int64(0), int64(0), 0
    status, readable, count, clean = read_chain(ring, regions, head, segments)
    return status, head, readable, count, clean


@kernel
def take(ring, head, copied, first):
    """The chain that was looked at is ours from here on. OK, or ERR_INFLIGHT.

    copied[first:]: its descriptors, if the ring is packed.
    """
    if ring.resubmit_next < ring.resubmit_count:
        ring.resubmit_next += 1
        return OK
    if ring.packed:
        if inflight_packed.note_taken(ring, copied, first) != OK:
            return ERR_INFLIGHT
        ring.last_avail_idx = packed_ring.advance(ring.last_avail_idx, ring.slots, ring.size)
        return OK
    if ring.inflight != _ZERO:
        inflight_split.note_taken(ring, head)
    ring.last_avail_idx = uint16(ring.last_avail_idx + 1)
    return OK


@inlined
def fetch_next(ring):
    """Fetch what is read as soon as a chain is available: meanwhile the driver may have written it.

    In a packed ring that is the descriptor that was looked at.
    """
    if not ring.packed:
        prefetch(split_ring.avail_slot(ring, ring.last_avail_idx))


@kernel
def fetch_used(ring):
    """Fetch the line of the used element that is written next; in a packed ring it is the descriptor's own."""
    if not ring.packed:
        prefetch_write(split_ring.next_element(ring))


@inlined
def hold(ring, taken):
    """A chain that was taken is the one in hand again. taken: a record with what a packed ring knows of it."""
    if ring.packed:
        ring.slots = taken.slots
        ring.buffer_id = taken.buffer_id
        ring.entry = taken.entry


@kernel
def give_back(ring, memory, head, written):
    """Put the chain in hand on the used ring; of a split one the driver sees it with the next `publish`."""
    ring.unpublished += 1
    if ring.packed:
        inflight_packed.note_used(ring)
        slot = packed_ring.entry_of(ring, ring.used_idx)
        packed_ring.put_used(ring, written)
        inflight_packed.note_published(ring)
        if ring.log_bytes and ring.log_used:
            dirty_log.mark(ring, memory, slot, uint64(DESC_SIZE))
        return
    element = split_ring.next_element(ring)
    if ring.inflight != _ZERO:
        inflight_split.note_used(ring, head)
    split_ring.put_used(ring, head, written)
    # Marked after it is written: a front-end may copy the page and clear its bit at any time.
    if ring.log_bytes:
        dirty_log.mark_used(ring, element - ring.used, USED_ELEM_SIZE)


@kernel
def publish(ring, one_address):
    """Show the driver everything given back so far, and the coordinator how far we are."""
    if not ring.packed:
        split_ring.publish(ring)
        if ring.inflight != _ZERO:
            inflight_split.note_published(ring, ring.unpublished)
    ring.unpublished = 0
    if ring.log_bytes:
        if not ring.packed:
            dirty_log.mark_used(ring, USED_IDX, 2)
        dirty_log.tell(ring, one_address)
    record = ring.record
    store_u16(record + _LAST_AVAIL, ring.last_avail_idx)
    store_u16(record + _USED_IDX, ring.used_idx)
    store_u32(record + _UNDER_WAY, uint32(ring.under_way))
    store_u64(record + _REQUESTS, ring.requests)
    store_u64(record + _ERRORS, ring.errors)
    store_u64(record + _READ_BYTES, ring.read_bytes)
    store_u64(record + _WRITTEN_BYTES, ring.written_bytes)
    store_u64(record + _FLUSHES, ring.flushes)
    store_u64(record + _KICKS, ring.kicks)
    store_u64(record + _CALLS, ring.calls)
    store_u64(record + _TURNS, ring.turns)
    store_u64(record + _WAITING_SUM, ring.waiting_sum)


@kernel
def tell_under_way(ring):
    """Show in the control block how many requests were taken and are not done; nothing may be published for long."""
    store_u32(ring.record + _UNDER_WAY, uint32(ring.under_way))


@kernel
def break_ring(ring, error, one_address):
    """The driver broke the ring: stop serving it and ring its err doorbell (SET_VRING_ERR)."""
    ring.error = int32(error)
    if ring.used != _ZERO:  # it may wait for a translation since it was started
        publish(ring, one_address)
    set_state(ring, cb.VRING_BROKEN)
    if ring.err_fd >= 0:
        ring_eventfd(ring.err_fd, one_address)


@kernel
def call_if_wanted(ring, one_address):
    """Call the driver if it wants to hear of what was published. True when it was called."""
    if ring.packed:
        return packed_ring.call_if_wanted(ring, one_address)
    return split_ring.call_if_wanted(ring, one_address)


@kernel
def mark_wish(ring):
    """Log the write that said whether we want kicks."""
    if ring.packed:
        dirty_log.mark_used(ring, 0, EVENT_BYTES)
    elif ring.event_idx:
        dirty_log.mark_used(ring, split_ring.avail_event(ring) - ring.used, 2)
    else:
        dirty_log.mark_used(ring, 0, 2)


@kernel
def want_kicks(ring):
    """Ask for a kick at the next available chain. True when one is there already: do not sleep."""
    more = packed_ring.want_kicks(ring) if ring.packed else split_ring.want_kicks(ring)
    if ring.log_bytes:
        mark_wish(ring)
    return more or ring.resubmit_next < ring.resubmit_count


@kernel
def refuse_kicks(ring):
    """We look by ourselves for now."""
    if ring.packed:
        packed_ring.refuse_kicks(ring)
    else:
        split_ring.refuse_kicks(ring)
    if ring.log_bytes and (ring.packed or not ring.event_idx):
        mark_wish(ring)


@kernel
def resume(ring, base, heads, counters):
    """Find out where to go on in a ring that starts: at `base`, or where a former back-end left it.

    heads, counters: int64[size], uint64[size] for the chains to do again. Returns (OK, ERR_INFLIGHT or
    ERR_RING_BASE; their number).
    """
    count = 0
    if ring.packed:
        used = inflight_packed.settle(ring, base)
        if used < 0:
            return used, 0
        ring.used_idx = uint16(used)
        count, slots = inflight_packed.list_inflight(ring, heads, counters)
        if slots > ring.size:
            return ERR_INFLIGHT, 0
        ring.last_avail_idx = packed_ring.advance(ring.used_idx, slots, ring.size)
    else:
        # Requests may complete in any order; without an inflight region nobody knows which those behind used.idx are.
        ring.used_idx = split_ring.read_used_idx(ring)
        if ring.inflight != _ZERO:
            inflight_split.settle(ring, ring.used_idx)
            count = inflight_split.list_inflight(ring, heads, counters)
        ring.last_avail_idx = uint16(ring.used_idx + count)
    ring.signalled_idx = ring.used_idx
    ring.unsignalled = 0
    ring.unpublished = 0
    ring.under_way = 0
    ring.blocked = 0
    ring.counter = _ZERO
    for k in range(count):
        ring.counter = max(ring.counter, counters[k] + _ONE)
    ring.resubmit_next = 0
    ring.resubmit_count = count
    return OK, count
