"""Kicks of siblings to interrupt eventfds: one thread asleep in epoll_wait, outside of the interpreter.

Edge-triggered: every write to a kick eventfd is one event, whatever its counter says, so nothing is read back (a
counter of 64 bits does not fill up). Two vrings that share an eventfd are both told, and a kick from before its route
was there is told when the route is added. The user data is the fd to signal: there is no table to look up.
"""

import numpy as np
from numba import int32, uint64

from kernels.jit import kernel
from kernels.memory import (
    libc_epoll_wait,
    load_acquire_u32,
    load_u32,
    load_u64,
    ring_eventfd,
    store_release_u32,
    store_u64,
)
from kernels.relay_record import EVENT, EVENT_BYTES, EVENTS_MAX, STATE, WAKE

_DATA = np.uint64(EVENT.fields["data"][1])
_ASKED = np.uint64(STATE.fields["asked"][1])
_SEEN = np.uint64(STATE.fields["seen"][1])
_STOP = np.uint64(STATE.fields["stop"][1])
_RELAYED = np.uint64(STATE.fields["relayed"][1])
_ONE = np.uint64(STATE.fields["one"][1])

_FAILURES_MAX = 1000  # EINTR is the only passing failure of epoll_wait; a closed fd fails at once, for ever


@kernel
def relay(epoll_fd, state, events):
    """Relay until told to stop. Returns 0, or -1 when epoll_wait keeps failing.

    state: address of a STATE whose `one` is 1. events: address of EVENTS_MAX EVENTs.
    When `seen` has followed `asked`, no fd that was removed before is in our hands any more.
    """
    failures = 0
    while failures < _FAILURES_MAX:
        store_release_u32(state + _SEEN, load_acquire_u32(state + _ASKED))
        if load_u32(state + _STOP):
            return 0
        count = libc_epoll_wait(epoll_fd, events, int32(EVENTS_MAX), int32(-1))
        failures = failures + 1 if count < 0 else 0
        for k in range(count):
            # The low half of the user data; in the packed form the whole is aligned to 4 only.
            target = load_u32(events + uint64(k) * uint64(EVENT_BYTES) + _DATA)
            if target != WAKE:
                ring_eventfd(int32(target), state + _ONE)
                store_u64(state + _RELAYED, load_u64(state + _RELAYED) + uint64(1))
    return -1
