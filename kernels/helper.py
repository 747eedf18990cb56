"""Helpers: threads of a worker that do what would make it wait, one request each at a time.

A helper sleeps in read(2) on its eventfd. The worker writes a slot into its record and wakes it; the helper leaves the
result in the slot and raises an eventfd of the worker's. Nothing of this takes a lock.
"""

import numpy as np
from numba import int32, uint32, uint64

from kernels.control_block import offset_of
from kernels.helper_record import GIVEN, HELPER, IDLE
from kernels.jit import kernel
from kernels.memory import load_acquire_u32, ring_eventfd, store_release_u32

_RECORD_BYTES = np.uint64(HELPER.itemsize)
_STATE = np.uint64(offset_of(HELPER, "state"))


@kernel
def state_address(helpers, index):
    """Address of a helper's state."""
    return uint64(helpers.ctypes.data) + uint64(index) * _RECORD_BYTES + _STATE


@kernel
def give(helpers, index, slot):
    """Have an idle helper do the request of `slot`."""
    helpers[index].slot = slot
    store_release_u32(state_address(helpers, index), uint32(GIVEN))
    ring_eventfd(int32(helpers[index].wake_fd), helpers[index].one)


@kernel
def state_of(helpers, index):
    """IDLE, GIVEN or DONE; with DONE the slot's result can be read."""
    return load_acquire_u32(state_address(helpers, index))


@kernel
def take_back(helpers, index):
    """The slot of a helper that was DONE, which is idle from here on."""
    slot = helpers[index].slot
    store_release_u32(state_address(helpers, index), uint32(IDLE))
    return slot
