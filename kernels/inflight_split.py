"""Inflight tracking of a split vring (docs/interop/vhost-user.rst, "Inflight I/O tracking").

The region is the front-end's memory: what is read from it is checked like anything of a driver. The order of the
stores is what a successor relies on: a release store keeps the compiler from changing it.
"""

import numpy as np
from numba import uint8, uint16, uint64

from kernels import inflight_layout as layout
from kernels.control_block import offset_of
from kernels.jit import kernel
from kernels.memory import (
    load_u8,
    load_u16,
    load_u64,
    store_release_u8,
    store_release_u16,
    store_u8,
    store_u16,
    store_u64,
)

_VERSION = np.uint64(offset_of(layout.SPLIT_HEAD, "version"))
_DESC_NUM = np.uint64(offset_of(layout.SPLIT_HEAD, "desc_num"))
_LAST_BATCH_HEAD = np.uint64(offset_of(layout.SPLIT_HEAD, "last_batch_head"))
_USED_IDX = np.uint64(offset_of(layout.SPLIT_HEAD, "used_idx"))
_HEAD_BYTES = np.uint64(layout.SPLIT_HEAD.itemsize)
_STATE_BYTES = np.uint64(layout.SPLIT_STATE.itemsize)
_NEXT = np.uint64(offset_of(layout.SPLIT_STATE, "next"))
_COUNTER = np.uint64(offset_of(layout.SPLIT_STATE, "counter"))


@kernel
def state_of(ring, head):
    """Address of a head descriptor's state; `head` was checked."""
    return ring.inflight + _HEAD_BYTES + uint64(head) * _STATE_BYTES


@kernel
def note_taken(ring, head):
    """The chain at `head` is in our hands."""
    state = state_of(ring, head)
    store_u64(state + _COUNTER, ring.counter)
    ring.counter += uint64(1)
    store_release_u8(state, uint8(1))


@kernel
def note_used(ring, head):
    """The chain at `head` is about to be shown as used, with the next batch."""
    store_u16(state_of(ring, head) + _NEXT, load_u16(ring.inflight + _LAST_BATCH_HEAD))
    store_release_u16(ring.inflight + _LAST_BATCH_HEAD, uint16(head))


@kernel
def note_published(ring, count):
    """The used index shows the `count` chains of the batch now. The region may say anything: heads are checked."""
    head = np.int64(load_u16(ring.inflight + _LAST_BATCH_HEAD))
    for _ in range(count):
        if head >= ring.size:
            break
        store_release_u8(state_of(ring, head), uint8(0))
        head = np.int64(load_u16(state_of(ring, head) + _NEXT))
    store_release_u16(ring.inflight + _USED_IDX, ring.used_idx)


@kernel
def settle(ring, used_idx):
    """Finish what a former back-end was doing when it ended; a fresh region is made ready. used_idx: the ring's."""
    if load_u16(ring.inflight + _VERSION) == 0:
        store_u16(ring.inflight + _DESC_NUM, uint16(ring.size))
        store_u16(ring.inflight + _USED_IDX, used_idx)
        store_release_u16(ring.inflight + _VERSION, uint16(layout.VERSION))
        return
    batch = uint16(used_idx - load_u16(ring.inflight + _USED_IDX))
    head = np.int64(load_u16(ring.inflight + _LAST_BATCH_HEAD))
    for _ in range(min(np.int64(batch), ring.size)):
        if head >= ring.size:
            break
        store_u8(state_of(ring, head), uint8(0))
        head = np.int64(load_u16(state_of(ring, head) + _NEXT))
    store_release_u16(ring.inflight + _USED_IDX, used_idx)


@kernel
def list_inflight(ring, heads, counters):
    """Write the heads that are inflight, and their counters, into int64[size] and uint64[size]. How many."""
    count = 0
    for head in range(ring.size):
        state = state_of(ring, head)
        if load_u8(state):
            heads[count] = head
            counters[count] = load_u64(state + _COUNTER)
            count += 1
    return count
