"""The device side of a packed virtqueue (virtio 1.2, 2.8).

A position is 16 bits: the slot in bits 0-14, the wrap counter in bit 15, as in ring bases and event suppression.
"""

import numpy as np
from numba import int64, uint16, uint64

from kernels.chain import add_buffer, indirect_table
from kernels.desc_word import FIELD_MASK, LEN_MASK, PACKED_FLAGS_SHIFT, PACKED_ID_SHIFT
from kernels.jit import kernel
from kernels.memory import (
    full_fence,
    load_acquire_u64,
    load_u16,
    load_u64,
    ring_eventfd,
    store_release_u64,
    store_u16,
)
from kernels.status import ERR_CHAIN_TOO_LONG, ERR_INDIRECT_TABLE, OK
from kernels.virtio_layout import (
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    DESC_SIZE,
    EVENT_F_DESC,
    EVENT_F_DISABLE,
    EVENT_F_ENABLE,
    EVENT_FLAGS,
    EVENT_OFF_WRAP,
    PACKED_DESC_F_AVAIL,
    PACKED_DESC_F_USED,
    PACKED_WRAP,
)

_ZERO = np.uint64(0)
_EIGHT = np.uint64(8)
_SLOT_MASK = PACKED_WRAP - 1


@kernel
def advance(position, count, size):
    """The position `count` slots further."""
    slot = int64(position) & _SLOT_MASK
    wrap = int64(position) & PACKED_WRAP
    slot += count
    if slot >= size:
        slot -= size
        wrap ^= PACKED_WRAP
    return uint16(slot | wrap)


@kernel
def entry_of(ring, position):
    """Address of the descriptor at a position."""
    return ring.desc + uint64(int64(position) & _SLOT_MASK) * uint64(DESC_SIZE)


@kernel
def is_available(word, position):
    """Whether the second half of a descriptor says that it is available at `position` (2.8.1)."""
    flags = int64(word >> PACKED_FLAGS_SHIFT)
    wrap = (int64(position) & PACKED_WRAP) != 0
    return ((flags & PACKED_DESC_F_AVAIL) != 0) == wrap and ((flags & PACKED_DESC_F_USED) != 0) != wrap


@kernel
def has_available(ring):
    """Whether there is a chain that we did not take."""
    return is_available(load_acquire_u64(entry_of(ring, ring.last_avail_idx) + _EIGHT), ring.last_avail_idx)


@kernel
def copy_chain(ring, position, copied, first, most):
    """Copy the chain at `position`, of at most `most` descriptors, into copied[first:][:n], each descriptor once.

    n, or ERR_CHAIN_TOO_LONG. It is available: the driver does that last, so all its descriptors are there (2.8.6).
    """
    count = int64(0)
    while count < most:
        entry = entry_of(ring, position)
        word = load_acquire_u64(entry + _EIGHT)
        copied[first + count, 0] = load_u64(entry)
        copied[first + count, 1] = word
        count += 1
        if not int64(word >> PACKED_FLAGS_SHIFT) & DESC_F_NEXT:
            return count
        position = advance(position, int64(1), ring.size)
    return int64(ERR_CHAIN_TOO_LONG)


@kernel
def read_indirect(ring, regions, segments, count, readable, address, length):
    """Add the buffers of an indirect table, all of whose descriptors count (2.8.7).

    Returns (status, count, readable, 1 when all are mapped and not empty).
    """
    status, table, entries = indirect_table(ring, regions, address, length)
    clean = 1
    for k in range(entries):
        entry = table + uint64(k) * uint64(DESC_SIZE)
        buffer = load_u64(entry)
        word = load_u64(entry + _EIGHT)
        flags = int64(word >> PACKED_FLAGS_SHIFT)
        if flags & DESC_F_INDIRECT:
            return ERR_INDIRECT_TABLE, count, readable, 0
        status, count, readable, good = add_buffer(
            ring, regions, segments, count, readable, buffer, word & LEN_MASK, flags & DESC_F_WRITE
        )
        if status != OK:
            return status, count, readable, 0
        clean &= good
    return status, count, readable, clean


@kernel
def read_copied(ring, regions, copied, length, segments):
    """Walk a chain of `length` descriptors that was copied.

    Returns (status, readable segments, all segments, 1 when every byte is mapped and no descriptor is empty).
    """
    count = int64(0)
    readable = int64(-1)
    clean = 1
    for k in range(length):
        word = copied[k, 1]
        flags = int64(word >> PACKED_FLAGS_SHIFT)
        if flags & DESC_F_INDIRECT:
            if k != length - 1:
                return ERR_INDIRECT_TABLE, int64(0), int64(0), 0
            status, count, readable, good = read_indirect(
                ring, regions, segments, count, readable, copied[k, 0], word & LEN_MASK
            )
        else:
            status, count, readable, good = add_buffer(
                ring, regions, segments, count, readable, copied[k, 0], word & LEN_MASK, flags & DESC_F_WRITE
            )
        if status != OK:
            return status, int64(0), int64(0), 0
        clean &= good
    ring.slots = length
    # The driver writes the id into the last descriptor of a chain (2.8.6).
    ring.buffer_id = int64((copied[length - 1, 1] >> PACKED_ID_SHIFT) & FIELD_MASK)
    if readable < 0:
        readable = count
    return OK, readable, count, clean


@kernel
def used_word(ring, written):
    """The second half of the used descriptor of the chain in hand: one store shows it to the driver (2.8.10)."""
    flags = int64(0)
    if ring.used_idx & PACKED_WRAP:
        flags = int64(PACKED_DESC_F_AVAIL | PACKED_DESC_F_USED)
    if written > _ZERO:
        flags |= DESC_F_WRITE
    return (written & LEN_MASK) | uint64(ring.buffer_id) << PACKED_ID_SHIFT | uint64(flags) << PACKED_FLAGS_SHIFT


@kernel
def put_used(ring, written):
    """Give the chain in hand back to the driver, which sees it at once."""
    store_release_u64(entry_of(ring, ring.used_idx) + _EIGHT, used_word(ring, written))
    ring.used_idx = advance(ring.used_idx, ring.slots, ring.size)
    ring.unsignalled += ring.slots


@kernel
def wants_call(ring):
    """Whether the driver wants to hear of what was used since the last decision (2.8.14)."""
    flags = int64(load_u16(ring.avail + uint64(EVENT_FLAGS))) & 3
    if flags == EVENT_F_DISABLE:
        return False
    if flags != EVENT_F_DESC or not ring.event_idx or not ring.signalled_valid:
        return True
    event = load_u16(ring.avail + uint64(EVENT_OFF_WRAP))
    slot = int64(event) & _SLOT_MASK
    if slot >= ring.size:
        return True  # a position that there is not: a call too many does no harm
    if (event ^ ring.used_idx) & PACKED_WRAP:
        slot -= ring.size
    new = int64(ring.used_idx) & _SLOT_MASK
    return slot < new and slot >= new - ring.unsignalled


@kernel
def call_if_wanted(ring, one_address):
    """Call the driver if it wants to hear of what was put. True when it was called."""
    if ring.unsignalled == 0 and ring.signalled_valid:
        return False
    full_fence()
    wanted = wants_call(ring)
    ring.unsignalled = 0
    ring.signalled_valid = uint16(1)
    if wanted and ring.call_fd >= 0:
        ring.calls += uint64(1)
        return ring_eventfd(ring.call_fd, one_address)
    return False


@kernel
def want_kicks(ring):
    """Ask for a kick at the next available chain. True when one is there already: do not sleep."""
    if ring.event_idx:
        store_u16(ring.used + uint64(EVENT_OFF_WRAP), ring.last_avail_idx)
        store_u16(ring.used + uint64(EVENT_FLAGS), uint16(EVENT_F_DESC))
    else:
        store_u16(ring.used + uint64(EVENT_FLAGS), uint16(EVENT_F_ENABLE))
    full_fence()
    return has_available(ring)


@kernel
def refuse_kicks(ring):
    """We look by ourselves for now."""
    store_u16(ring.used + uint64(EVENT_FLAGS), uint16(EVENT_F_DISABLE))
