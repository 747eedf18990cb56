"""Inflight tracking of a packed vring (docs/interop/vhost-user.rst, "Inflight I/O tracking").

A packed ring itself does not tell where a back-end that was killed stood, so that workers always keep such a region:
the front-end's, or one of the pool's own. What is read from it is checked like anything of a driver.

The order of the stores is what a successor relies on: a release store keeps the compiler from changing it.
"""

import numpy as np
from numba import int64, uint8, uint16, uint32, uint64

from kernels import inflight_layout as layout
from kernels.control_block import offset_of
from kernels.desc_word import LEN_MASK, PACKED_FLAGS_SHIFT, PACKED_ID_SHIFT
from kernels.jit import kernel
from kernels.memory import (
    load_acquire_u64,
    load_u8,
    load_u16,
    load_u32,
    load_u64,
    store_release_u8,
    store_release_u16,
    store_release_u64,
    store_u8,
    store_u16,
    store_u32,
    store_u64,
)
from kernels.packed_ring import advance, entry_of, is_available
from kernels.status import ERR_INFLIGHT, ERR_RING_BASE
from kernels.virtio_layout import PACKED_WRAP

_VERSION = np.uint64(offset_of(layout.PACKED_HEAD, "version"))
_DESC_NUM = np.uint64(offset_of(layout.PACKED_HEAD, "desc_num"))
_FREE_HEAD = np.uint64(offset_of(layout.PACKED_HEAD, "free_head"))
_OLD_FREE_HEAD = np.uint64(offset_of(layout.PACKED_HEAD, "old_free_head"))
_USED_IDX = np.uint64(offset_of(layout.PACKED_HEAD, "used_idx"))
_OLD_USED_IDX = np.uint64(offset_of(layout.PACKED_HEAD, "old_used_idx"))
_USED_WRAP = np.uint64(offset_of(layout.PACKED_HEAD, "used_wrap_counter"))
_OLD_USED_WRAP = np.uint64(offset_of(layout.PACKED_HEAD, "old_used_wrap_counter"))
_HEAD_BYTES = np.uint64(layout.PACKED_HEAD.itemsize)
_STATE_BYTES = np.uint64(layout.PACKED_STATE.itemsize)
_NEXT = np.uint64(offset_of(layout.PACKED_STATE, "next"))
_LAST = np.uint64(offset_of(layout.PACKED_STATE, "last"))
_NUM = np.uint64(offset_of(layout.PACKED_STATE, "num"))
_COUNTER = np.uint64(offset_of(layout.PACKED_STATE, "counter"))
_ID = np.uint64(offset_of(layout.PACKED_STATE, "id"))
_FLAGS = np.uint64(offset_of(layout.PACKED_STATE, "flags"))
_LEN = np.uint64(offset_of(layout.PACKED_STATE, "len"))
_ADDR = np.uint64(offset_of(layout.PACKED_STATE, "addr"))
_EIGHT = np.uint64(8)
_SLOT_MASK = PACKED_WRAP - 1
# Within the 8 bytes at used_idx.
_OLD_SLOT_SHIFT = np.uint64(8 * (offset_of(layout.PACKED_HEAD, "old_used_idx") - int(_USED_IDX)))
_WRAP_SHIFT = np.uint64(8 * (offset_of(layout.PACKED_HEAD, "used_wrap_counter") - int(_USED_IDX)))
_OLD_WRAP_SHIFT = np.uint64(8 * (offset_of(layout.PACKED_HEAD, "old_used_wrap_counter") - int(_USED_IDX)))


@kernel
def state_at(ring, index):
    """Address of a state; `index` was checked."""
    return ring.inflight + _HEAD_BYTES + uint64(index) * _STATE_BYTES


@kernel
def note_taken(ring, copied, first):
    """The chain copied[first:][:ring.slots] is in our hands. OK (0), or ERR_INFLIGHT: the region is damaged."""
    head = int64(load_u16(ring.inflight + _OLD_FREE_HEAD))
    free = head
    last = head
    if head >= ring.size:
        return ERR_INFLIGHT
    for k in range(first, first + ring.slots):
        if free >= ring.size:
            return ERR_INFLIGHT
        state = state_at(ring, free)
        store_u64(state + _ADDR, copied[k, 0])
        store_u32(state + _LEN, uint32(copied[k, 1] & LEN_MASK))
        store_u16(state + _ID, uint16(copied[k, 1] >> PACKED_ID_SHIFT))
        store_u16(state + _FLAGS, uint16(copied[k, 1] >> PACKED_FLAGS_SHIFT))
        last = free
        free = int64(load_u16(state + _NEXT))
    state = state_at(ring, head)
    store_u16(state + _NUM, uint16(ring.slots))
    store_u16(state + _LAST, uint16(last))
    store_u64(state + _COUNTER, ring.counter)
    ring.counter += uint64(1)
    store_release_u8(state, uint8(1))
    store_release_u16(ring.inflight + _FREE_HEAD, uint16(free))
    store_release_u16(ring.inflight + _OLD_FREE_HEAD, uint16(free))
    ring.entry = head
    return 0


@kernel
def note_used(ring):
    """The chain in hand is about to be shown as used; ring.used_idx is still where it goes."""
    last = int64(load_u16(state_at(ring, ring.entry) + _LAST))
    if last < ring.size:
        store_u16(state_at(ring, last) + _NEXT, load_u16(ring.inflight + _FREE_HEAD))
    store_u16(ring.inflight + _FREE_HEAD, uint16(ring.entry))
    after = advance(ring.used_idx, ring.slots, ring.size)
    store_u16(ring.inflight + _USED_IDX, uint16(int64(after) & _SLOT_MASK))
    store_u8(ring.inflight + _USED_WRAP, uint8(int64(after) >> 15))


@kernel
def note_published(ring):
    """The driver has it now."""
    store_release_u8(state_at(ring, ring.entry), uint8(0))
    commit(ring)


@kernel
def store_used(ring, slot, wrap):
    """Set used_idx, old_used_idx and both wrap counters by one store, which a death cannot cut in two.

    With the old slot and the old wrap counter of two different moments, what to commit could not be told. They lie in
    one aligned word, with 2 bytes of padding behind.
    """
    word = (
        uint64(slot) | uint64(slot) << _OLD_SLOT_SHIFT | uint64(wrap) << _WRAP_SHIFT | uint64(wrap) << _OLD_WRAP_SHIFT
    )
    store_release_u64(ring.inflight + _USED_IDX, word)


@kernel
def commit(ring):
    """What was in progress is done."""
    store_u16(ring.inflight + _OLD_FREE_HEAD, load_u16(ring.inflight + _FREE_HEAD))
    slot = int64(load_u16(ring.inflight + _USED_IDX))
    store_used(ring, slot, int64(load_u8(ring.inflight + _USED_WRAP)) & 1)


@kernel
def prepare(ring, position):
    """Make a fresh region ready for a ring that starts at `position`."""
    for k in range(ring.size):
        store_u8(state_at(ring, k), uint8(0))
        store_u16(state_at(ring, k) + _NEXT, uint16(k + 1))
    store_u16(ring.inflight + _DESC_NUM, uint16(ring.size))
    store_u16(ring.inflight + _FREE_HEAD, uint16(0))
    store_u16(ring.inflight + _OLD_FREE_HEAD, uint16(0))
    store_used(ring, int64(position) & _SLOT_MASK, int64(position) >> 15)
    store_release_u16(ring.inflight + _VERSION, uint16(layout.VERSION))


@kernel
def settle(ring, position):
    """Finish or take back what a former back-end was doing when it ended; a fresh region is made ready.

    position: where the front-end says that the ring stands, used for a fresh region only. Returns the used position,
    ERR_RING_BASE or ERR_INFLIGHT. What is returned was read once: the front-end can write to the region at any time.
    """
    if load_u16(ring.inflight + _VERSION) == 0:
        if int64(position) & _SLOT_MASK >= ring.size:
            return int64(ERR_RING_BASE)
        prepare(ring, position)
        return int64(position)
    slot = int64(load_u16(ring.inflight + _USED_IDX))
    old_slot = int64(load_u16(ring.inflight + _OLD_USED_IDX))
    old_wrap = int64(load_u8(ring.inflight + _OLD_USED_WRAP)) & 1
    wrap = int64(load_u8(ring.inflight + _USED_WRAP)) & 1
    if slot >= ring.size or old_slot >= ring.size:
        return int64(ERR_INFLIGHT)
    if slot != old_slot or wrap != old_wrap:
        before = uint16(old_slot | old_wrap << 15)
        if not is_available(load_acquire_u64(entry_of(ring, before) + _EIGHT), before):
            store_u16(ring.inflight + _OLD_FREE_HEAD, load_u16(ring.inflight + _FREE_HEAD))
            old_slot = slot
            old_wrap = wrap
    free = int64(load_u16(ring.inflight + _OLD_FREE_HEAD))
    store_u16(ring.inflight + _FREE_HEAD, uint16(free))
    store_used(ring, old_slot, old_wrap)
    for _ in range(ring.size):
        if free >= ring.size:
            break
        store_u8(state_at(ring, free), uint8(0))
        free = int64(load_u16(state_at(ring, free) + _NEXT))
    return old_slot | old_wrap << 15


@kernel
def list_inflight(ring, heads, counters):
    """Write the head entries that are inflight, and their counters. (how many, descriptors of theirs in the ring)."""
    count = 0
    slots = int64(0)
    for k in range(ring.size):
        state = state_at(ring, k)
        if load_u8(state):
            heads[count] = k
            counters[count] = load_u64(state + _COUNTER)
            slots += int64(load_u16(state + _NUM))
            count += 1
    return count, slots


@kernel
def copy_inflight(ring, entry, copied):
    """Copy the chain of a head entry into copied[:n]. n, or ERR_INFLIGHT."""
    count = int64(load_u16(state_at(ring, entry) + _NUM))
    if count == 0 or count > ring.size:
        return int64(ERR_INFLIGHT)
    index = int64(entry)
    for k in range(count):
        if index >= ring.size:
            return int64(ERR_INFLIGHT)
        state = state_at(ring, index)
        copied[k, 0] = load_u64(state + _ADDR)
        flags = uint64(load_u16(state + _FLAGS)) << PACKED_FLAGS_SHIFT
        copied[k, 1] = uint64(load_u32(state + _LEN)) | uint64(load_u16(state + _ID)) << PACKED_ID_SHIFT | flags
        index = int64(load_u16(state + _NEXT))
    ring.entry = int64(entry)
    return count
