"""The device side of a split virtqueue (virtio 1.2, 2.7): what is available, what is used, who must be woken."""

import numpy as np
from numba import uint16, uint32, uint64

from kernels.jit import inlined, kernel
from kernels.memory import (
    full_fence,
    load_acquire_u16,
    load_u16,
    ring_eventfd,
    store_release_u16,
    store_u16,
    store_u32,
)
from kernels.status import ERR_AVAIL_IDX, ERR_HEAD_INDEX
from kernels.virtio_layout import (
    AVAIL_F_NO_INTERRUPT,
    AVAIL_FLAGS,
    AVAIL_IDX,
    AVAIL_RING,
    USED_ELEM_SIZE,
    USED_F_NO_NOTIFY,
    USED_FLAGS,
    USED_IDX,
    USED_RING,
)


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


@inlined
def avail_slot(ring, index):
    """Address of the available ring's entry of an index (2.7.6), the device's or the driver's."""
    return ring.avail + uint64(AVAIL_RING) + uint64(2) * (uint64(index) & uint64(ring.size - 1))


@inlined
def used_element(ring, index):
    """Address of the used ring's element of an index (2.7.8), the device's or the driver's."""
    return ring.used + uint64(USED_RING) + uint64(USED_ELEM_SIZE) * (uint64(index) & uint64(ring.size - 1))


@inlined
def used_event(ring):
    """Address of the driver's word behind the available ring: when it wants to be called (2.7.7)."""
    return ring.avail + uint64(AVAIL_RING) + uint64(2) * uint64(ring.size)


@inlined
def avail_event(ring):
    """Address of the device's word behind the used ring: when it wants to be kicked (2.7.10)."""
    return ring.used + uint64(USED_RING) + uint64(USED_ELEM_SIZE) * uint64(ring.size)


@kernel
def next_head(ring):
    """The head descriptor of the next available chain, which stays untaken; negative: ERR_HEAD_INDEX."""
    head = np.int64(load_u16(avail_slot(ring, ring.last_avail_idx)))
    if head >= ring.size:
        return ERR_HEAD_INDEX
    return head


@kernel
def next_element(ring):
    """Address of the used element that is written next."""
    return used_element(ring, ring.used_idx)


@kernel
def put_used(ring, head, written):
    """Write a used element behind those already put; the driver sees it with the next `publish`."""
    element = next_element(ring)
    store_u32(element, uint32(head))
    store_u32(element + uint64(4), uint32(written))
    ring.used_idx = uint16(ring.used_idx + 1)


@kernel
def publish(ring):
    """Show the driver everything put so far."""
    store_release_u16(ring.used + uint64(USED_IDX), ring.used_idx)


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
        event = load_u16(used_event(ring))
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
        store_u16(avail_event(ring), ring.last_avail_idx)
    else:
        store_u16(ring.used + uint64(USED_FLAGS), uint16(0))
    full_fence()
    return load_acquire_u16(ring.avail + uint64(AVAIL_IDX)) != ring.last_avail_idx


@kernel
def refuse_kicks(ring):
    """We look by ourselves for now. With EVENT_IDX nothing is to be done: avail_event stays behind."""
    if not ring.event_idx:
        store_u16(ring.used + uint64(USED_FLAGS), uint16(USED_F_NO_NOTIFY))
