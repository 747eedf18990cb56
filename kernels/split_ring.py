"""The device side of a split virtqueue (virtio 1.2, 2.7): what is available, what is used, who must be woken."""

import numpy as np
from numba import int32, uint16, uint32, uint64

from kernels import control_block as cb
from kernels.jit import kernel
from kernels.memory import (
    full_fence,
    load_acquire_u16,
    load_u16,
    ring_eventfd,
    store_release_u16,
    store_release_u32,
    store_u16,
    store_u32,
    store_u64,
)
from kernels.regions import UVA, contiguous
from kernels.status import ERR_AVAIL_IDX, ERR_HEAD_INDEX, ERR_QUEUE_SIZE, ERR_RING_ADDRESS, OK
from kernels.virtio_layout import (
    AVAIL_F_NO_INTERRUPT,
    AVAIL_FLAGS,
    AVAIL_IDX,
    AVAIL_RING,
    DESC_SIZE,
    QUEUE_SIZE_MAX,
    USED_ELEM_SIZE,
    USED_F_NO_NOTIFY,
    USED_FLAGS,
    USED_IDX,
    USED_RING,
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


@kernel
def place_ring(ring, regions, desc_uva, avail_uva, used_uva):
    """Translate and check the three parts of a ring (virtio 1.2, 2.7: alignment 16, 2, 4). OK or ERR_*."""
    size = uint64(ring.size)
    if size == 0 or size > QUEUE_SIZE_MAX or size & (size - uint64(1)):
        return ERR_QUEUE_SIZE
    if desc_uva & uint64(15) or avail_uva & uint64(1) or used_uva & uint64(3):
        return ERR_RING_ADDRESS
    # used_event and avail_event are part of the areas even when EVENT_IDX is off (2.7.6, 2.7.8 sizes).
    desc = contiguous(regions, desc_uva, size * uint64(DESC_SIZE), UVA)
    avail = contiguous(regions, avail_uva, uint64(6) + uint64(2) * size, UVA)
    used = contiguous(regions, used_uva, uint64(6) + uint64(8) * size, UVA)
    if desc == 0 or avail == 0 or used == 0:
        return ERR_RING_ADDRESS
    ring.desc = desc
    ring.avail = avail
    ring.used = used
    return OK


@kernel
def read_used_idx(ring):
    """The used index as the ring itself has it: where a worker that was killed had got to."""
    return load_u16(ring.used + uint64(USED_IDX))


@kernel
def count_available(ring):
    """How many chains the driver made available and we did not take; negative: ERR_AVAIL_IDX."""
    available = uint16(load_acquire_u16(ring.avail + uint64(AVAIL_IDX)) - ring.last_avail_idx)
    if available > ring.size:
        return ERR_AVAIL_IDX
    return np.int64(available)


@kernel
def next_head(ring):
    """The head descriptor of the next available chain, which stays untaken; negative: ERR_HEAD_INDEX."""
    slot = uint64(ring.last_avail_idx) & uint64(ring.size - 1)
    head = np.int64(load_u16(ring.avail + uint64(AVAIL_RING) + uint64(2) * slot))
    if head >= ring.size:
        return ERR_HEAD_INDEX
    return head


@kernel
def put_used(ring, head, written):
    """Write a used element behind those already put; the driver sees it with the next `publish`."""
    slot = uint64(ring.used_idx) & uint64(ring.size - 1)
    element = ring.used + uint64(USED_RING) + uint64(USED_ELEM_SIZE) * slot
    store_u32(element, uint32(head))
    store_u32(element + uint64(4), uint32(written))
    ring.used_idx = uint16(ring.used_idx + 1)
    ring.last_avail_idx = uint16(ring.last_avail_idx + 1)


@kernel
def publish(ring):
    """Show the driver everything put so far, and the coordinator how far we are."""
    store_release_u16(ring.used + uint64(USED_IDX), ring.used_idx)
    record = ring.record
    store_u16(record + _LAST_AVAIL, ring.last_avail_idx)
    store_u16(record + _USED_IDX, ring.used_idx)
    store_u64(record + _REQUESTS, ring.requests)
    store_u64(record + _ERRORS, ring.errors)
    store_u64(record + _READ_BYTES, ring.read_bytes)
    store_u64(record + _WRITTEN_BYTES, ring.written_bytes)
    store_u64(record + _FLUSHES, ring.flushes)
    store_u64(record + _KICKS, ring.kicks)
    store_u64(record + _CALLS, ring.calls)


@kernel
def set_state(ring, state):
    """Change the ring's state, here and in the control block."""
    ring.state = int32(state)
    store_u32(ring.record + _ERROR, uint32(ring.error))
    store_release_u32(ring.record + _STATE, uint32(state))


@kernel
def needs_event(event, new, old):
    """Whether moving an index from `old` to `new` passed `event` (virtio 1.2, 2.7.10)."""
    return uint16(new - event - uint16(1)) < uint16(new - old)


@kernel
def call_if_wanted(ring, one_address):
    """Call the driver if it wants to hear of what was published (2.7.7, 2.7.10). True when it was called."""
    if ring.used_idx == ring.signalled_idx and ring.signalled_valid:
        return False
    # The driver writes used_event (or flags), then looks at used.idx; we do it the other way round.
    full_fence()
    if ring.event_idx:
        event = load_u16(ring.avail + uint64(AVAIL_RING) + uint64(2) * uint64(ring.size))
        wanted = not ring.signalled_valid or needs_event(event, ring.used_idx, ring.signalled_idx)
    else:
        wanted = not load_u16(ring.avail + uint64(AVAIL_FLAGS)) & AVAIL_F_NO_INTERRUPT
    ring.signalled_idx = ring.used_idx
    ring.signalled_valid = uint16(1)
    if wanted and ring.call_fd >= 0:
        ring.calls += uint64(1)
        return ring_eventfd(ring.call_fd, one_address)
    return False


@kernel
def want_kicks(ring):
    """Ask for a kick at the next available chain. True when one is there already: do not sleep (2.7.10)."""
    if ring.event_idx:
        store_u16(ring.used + uint64(USED_RING) + uint64(USED_ELEM_SIZE) * uint64(ring.size), ring.last_avail_idx)
    else:
        store_u16(ring.used + uint64(USED_FLAGS), uint16(0))
    full_fence()
    return load_acquire_u16(ring.avail + uint64(AVAIL_IDX)) != ring.last_avail_idx


@kernel
def refuse_kicks(ring):
    """We look by ourselves for now. With EVENT_IDX nothing is to be done: avail_event stays behind."""
    if not ring.event_idx:
        store_u16(ring.used + uint64(USED_FLAGS), uint16(USED_F_NO_NOTIFY))
