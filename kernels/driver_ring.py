"""The driver side of a split virtqueue (virtio 1.2, 2.7), one request for each tag.

A tag owns its descriptors for good: three of the table (direct), or one of the table and three in guest memory
(indirect). So nothing is allocated, and a request costs an entry of the available ring and the words that changed.
"""

import numpy as np
from numba import int64, uint8, uint16, uint32, uint64

from kernels.driver_layout import (
    DESCS_PER_REQUEST,
    ERR_USED_ID,
    ERR_USED_IDX,
    ERR_USED_LEN,
    STATUS_UNSET,
    TAG_STATUS_OFF,
    TAG_TABLE_OFF,
)
from kernels.jit import inlined, kernel
from kernels.memory import (
    drain_eventfd,
    full_fence,
    load_acquire_u16,
    load_u8,
    load_u16,
    load_u32,
    prefetch,
    prefetch_write,
    ring_eventfd,
    store_release_u16,
    store_u8,
    store_u16,
    store_u32,
    store_u64,
)
from kernels.split_ring import avail_event, avail_slot, needs_event, used_element, used_event
from kernels.virtio_layout import (
    AVAIL_F_NO_INTERRUPT,
    AVAIL_FLAGS,
    AVAIL_IDX,
    BLK_HEADER_SIZE,
    BLK_T_FLUSH,
    BLK_T_OUT,
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    DESC_SIZE,
    USED_F_NO_NOTIFY,
    USED_FLAGS,
    USED_IDX,
)

_ZERO = np.uint64(0)
_ONE = np.uint64(1)
_DESC = np.uint64(DESC_SIZE)


@kernel
def put_desc(address, target_gpa, length, flags, following):
    """Write one descriptor (2.7.5)."""
    store_u64(address, target_gpa)
    store_u32(address + uint64(8), uint32(length))
    store_u16(address + uint64(12), uint16(flags))
    store_u16(address + uint64(14), uint16(following))


@kernel
def reset_ring(ring):
    """Both rings empty and at index 0, as a device expects them at base 0."""
    for k in range(ring.size):
        put_desc(ring.desc + _DESC * uint64(k), _ZERO, 0, 0, 0)
    store_u16(ring.used + uint64(USED_FLAGS), uint16(0))
    store_u16(avail_event(ring), uint16(0))
    store_u16(used_event(ring), uint16(0))
    store_u16(ring.avail + uint64(AVAIL_FLAGS), uint16(0))
    store_release_u16(ring.used + uint64(USED_IDX), uint16(0))
    store_release_u16(ring.avail + uint64(AVAIL_IDX), uint16(0))
    ring.avail_idx = uint16(0)
    ring.published_idx = uint16(0)
    ring.last_used_idx = uint16(0)
    ring.in_flight = 0


@kernel
def attach_tags(ring, tags, heads):
    """Give each tag its descriptors. heads: int32[ring.size], becomes the tag of each head, -1 for none.

    tags: at most ring.size with indirect descriptors, a third of it without.
    """
    heads[:] = -1
    for k in range(tags.shape[0]):
        tag = tags[k]
        if ring.indirect:
            tag.head = uint16(k)
            tag.first = uint16(0)
            tag.table = tag.place + uint64(TAG_TABLE_OFF)
            length = DESCS_PER_REQUEST * DESC_SIZE
            put_desc(ring.desc + _DESC * uint64(k), tag.table - ring.ram, length, DESC_F_INDIRECT, 0)
        else:
            tag.head = uint16(DESCS_PER_REQUEST * k)
            tag.first = tag.head
            tag.table = ring.desc + _DESC * uint64(tag.head)
        tag.shape = uint32(0)
        heads[tag.head] = k


@kernel
def fill_table(ring, tag):
    """Write the tag's descriptors for its kind, data and length (5.2.6; a flush has no data)."""
    base = int64(tag.first)
    has_data = tag.kind != BLK_T_FLUSH
    put_desc(tag.table, tag.place - ring.ram, BLK_HEADER_SIZE, DESC_F_NEXT, base + (1 if has_data else 2))
    flags = DESC_F_NEXT if tag.kind == BLK_T_OUT else DESC_F_NEXT | DESC_F_WRITE
    put_desc(tag.table + _DESC, tag.data - ring.ram, tag.length, flags, base + 2)
    status_gpa = tag.place - ring.ram + uint64(TAG_STATUS_OFF)
    put_desc(tag.table + uint64(2) * _DESC, status_gpa, 1, DESC_F_WRITE, 0)
    tag.shape = uint32(tag.kind + uint32(1))


@kernel
def put_request(ring, tag):
    """Make the tag's request available; the device sees it with the next `publish`."""
    place = tag.place
    store_u32(place, tag.kind)
    store_u64(place + uint64(8), tag.sector)
    store_u8(place + uint64(TAG_STATUS_OFF), uint8(STATUS_UNSET))
    if tag.shape != uint32(tag.kind + uint32(1)):
        fill_table(ring, tag)
    store_u16(avail_slot(ring, ring.avail_idx), tag.head)
    ring.avail_idx = uint16(ring.avail_idx + 1)
    tag.in_flight = uint32(1)
    ring.in_flight += 1
    ring.latest = place


@kernel
def publish(ring):
    """Show the device what was put, and kick it if it wants to be (2.7.10, 2.7.13.4). True when it was kicked."""
    old = ring.published_idx
    new = ring.avail_idx
    if new == old:
        return False
    ring.published_idx = new
    store_release_u16(ring.avail + uint64(AVAIL_IDX), new)
    # The device writes avail_event (or flags), then looks at avail.idx; we do it the other way round.
    full_fence()
    if ring.event_idx:
        event = load_u16(avail_event(ring))
        wanted = needs_event(event, new, old)
    else:
        wanted = not load_u16(ring.used + uint64(USED_FLAGS)) & USED_F_NO_NOTIFY
    if not wanted:
        return False
    ring.kicks += _ONE
    return ring_eventfd(ring.kick_fd, ring.one)


@inlined
def fetch_answer(ring):
    """Fetch what is read and written next when the only request came back, all of it at once."""
    prefetch_write(ring.latest)  # with its status, and likely to be the next request's place
    prefetch(used_element(ring, ring.last_used_idx))
    prefetch_write(avail_slot(ring, ring.avail_idx))


@kernel
def count_used(ring):
    """How many requests came back and were not taken; negative: ERR_USED_IDX."""
    used = int64(uint16(load_acquire_u16(ring.used + uint64(USED_IDX)) - ring.last_used_idx))
    if used == 1 and ring.in_flight == 1:
        fetch_answer(ring)
    return used if used <= ring.in_flight else ERR_USED_IDX


@kernel
def take_used(ring, tags, heads):
    """The tag of the next used element, no longer in flight; negative: ERR_USED_*. Call only after count_used."""
    element = used_element(ring, ring.last_used_idx)
    head = int64(load_u32(element))
    written = uint64(load_u32(element + uint64(4)))
    if head >= ring.size or heads[head] < 0:
        return int64(ERR_USED_ID)
    index = int64(heads[head])
    tag = tags[index]
    if not tag.in_flight:
        return int64(ERR_USED_ID)
    if written > _ONE + (_ZERO if tag.kind == BLK_T_OUT else tag.length):
        return int64(ERR_USED_LEN)
    ring.last_used_idx = uint16(ring.last_used_idx + 1)
    tag.in_flight = uint32(0)
    ring.in_flight -= 1
    return index


@kernel
def status_of(tag):
    """The status byte that the device wrote, STATUS_UNSET if it wrote none."""
    return int64(load_u8(tag.place + uint64(TAG_STATUS_OFF)))


@kernel
def resubmit(ring, tags, heads):
    """On a ring that was reset: put every request that was in flight once more. All of them may be done twice."""
    attach_tags(ring, tags, heads)
    for k in range(tags.shape[0]):
        if tags[k].in_flight:
            put_request(ring, tags[k])
    publish(ring)


@kernel
def refuse_calls(ring):
    """We look by ourselves for now. With EVENT_IDX nothing is to be done: used_event stays behind."""
    if not ring.event_idx:
        store_u16(ring.avail + uint64(AVAIL_FLAGS), uint16(AVAIL_F_NO_INTERRUPT))


@kernel
def want_calls(ring):
    """Ask for a call at the next used request. True when one is there already: do not sleep (2.7.7, 2.7.10)."""
    if ring.event_idx:
        store_u16(used_event(ring), ring.last_used_idx)
    else:
        store_u16(ring.avail + uint64(AVAIL_FLAGS), uint16(0))
    full_fence()
    return load_acquire_u16(ring.used + uint64(USED_IDX)) != ring.last_used_idx


@kernel
def drain_call(ring):
    """Reset the call eventfd after a sleep."""
    if drain_eventfd(ring.call_fd, ring.scratch):
        ring.calls += _ONE
