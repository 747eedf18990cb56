"""Kicks of siblings to interrupt eventfds: one thread asleep in epoll_wait, outside of the interpreter.

The event's user data says what to do, so that there is no table to look up: the low half is the fd to drain, the high
half the fd to signal; WAKE instead of the latter means that the control plane wants to be heard.
"""

import platform

import numpy as np
from numba import int32, uint64

from kernels.jit import kernel
from kernels.memory import (
    drain_eventfd,
    libc_epoll_wait,
    load_acquire_u32,
    load_u32,
    load_u64,
    ring_eventfd,
    store_release_u32,
    store_u64,
)

#: epoll_event: le32 events, 64-bit user data; packed on x86-64, aligned elsewhere (linux/eventpoll.h)
EVENT = np.dtype([("events", "<u4"), ("data", "<u8")], align=platform.machine() != "x86_64")
EVENT_BYTES = EVENT.itemsize
EVENTS_MAX = 64

#: What both sides of the relay share, in memory of this process.
STATE = np.dtype(
    [
        ("asked", "<u4"),  # counted up by the control plane
        ("seen", "<u4"),  # the last `asked` that the thread saw between two batches
        ("stop", "<u4"),
        ("_pad", "<u4"),
        ("relayed", "<u8"),
        ("one", "<u8"),  # a 64-bit 1, what is written to an eventfd
    ]
)
_DATA = np.uint64(EVENT.fields["data"][1])
_ASKED = np.uint64(STATE.fields["asked"][1])
_SEEN = np.uint64(STATE.fields["seen"][1])
_STOP = np.uint64(STATE.fields["stop"][1])
_RELAYED = np.uint64(STATE.fields["relayed"][1])
_ONE = np.uint64(STATE.fields["one"][1])
_FOUR = np.uint64(4)

WAKE = 0xFFFFFFFF
_FAILURES_MAX = 1000  # EINTR is the only passing failure of epoll_wait; a closed fd fails at once, for ever


def user_data(drain_fd: int, signal_fd: int) -> int:
    """The user data of an eventfd to drain; signal_fd: the eventfd to signal then, or WAKE."""
    return drain_fd | signal_fd << 32


@kernel
def relay(epoll_fd, state, events, scratch):
    """Relay until told to stop. Returns 0, or -1 when epoll_wait keeps failing.

    state: address of a STATE whose `one` is 1. events: address of EVENTS_MAX EVENTs. scratch: address of 8 bytes.
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
            # Two 32-bit loads: in the packed form the 64-bit field is aligned to 4 only.
            data = events + uint64(k) * uint64(EVENT_BYTES) + _DATA
            drained = drain_eventfd(int32(load_u32(data)), scratch)
            target = load_u32(data + _FOUR)
            if drained and target != WAKE:
                ring_eventfd(int32(target), state + _ONE)
                store_u64(state + _RELAYED, load_u64(state + _RELAYED) + uint64(1))
    return -1
