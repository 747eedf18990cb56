"""How a worker waits, whatever its device: spin while that pays, then sleep until somebody kicks or commands."""

import numpy as np
from numba import int32, int64, uint64

from kernels import control_block as cb
from kernels.jit import kernel
from kernels.memory import (
    drain_eventfd,
    libc_poll,
    libc_sched_yield,
    load_acquire_u32,
    load_u32,
    load_u64,
    monotonic_ns,
    spin_hint,
    store_u32,
    store_u64,
)
from kernels.spin_time import adapt_spin
from kernels.vring import call_if_wanted, refuse_kicks, want_kicks

_ATTENTION = np.uint64(cb.offset_of(cb.WORKER, "attention"))
_HEARTBEAT = np.uint64(cb.offset_of(cb.WORKER, "heartbeat"))
_SLEEPS = np.uint64(cb.offset_of(cb.WORKER, "sleeps"))
_ONE = np.uint64(1)

_POLITE_AFTER_NS = 3_000  # from then on let others have the CPU between two looks
_LOOK_AT_ALL = 8  # looks at one ring, and requests of it, before it is the others' turn; with more rings, that many
_LOOK_AT_CLOCK = 16  # spins between two looks at the clock
_UNKICKED_MS = int32(1)  # longest sleep when a ring has no kick fd and must be polled


@kernel
def command_waiting(loop):
    """Whether the coordinator raised the attention word."""
    return load_acquire_u32(loop.record + _ATTENTION) != loop.attention_seen


@kernel
def ask_and_poll(loop, rings, pollfds, ready):
    """Ask for kicks, then wait for one or for a command. Returns nanoseconds asleep; 0: there was work already."""
    timeout = int32(-1)
    pollfds[0].revents = np.int16(0)
    for k in range(rings.shape[0]):
        ring = rings[k]
        # What is blocked goes on when something under way ends.
        running = ring.state == cb.VRING_RUNNING and not ring.blocked
        pollfds[k + 1].fd = ring.kick_fd if running else int32(-1)
        if running:
            if ring.kick_fd < 0:
                timeout = _UNKICKED_MS
            ready |= want_kicks(ring)
    slept = int64(0)
    if not ready and not command_waiting(loop):
        store_u64(loop.record + _SLEEPS, load_u64(loop.record + _SLEEPS) + _ONE)
        before = monotonic_ns(loop.scratch)
        libc_poll(uint64(pollfds.ctypes.data), uint64(pollfds.shape[0]), timeout)
        slept = monotonic_ns(loop.scratch) - before
        for k in range(rings.shape[0]):
            ring = rings[k]
            if pollfds[k + 1].fd >= 0 and pollfds[k + 1].revents and drain_eventfd(ring.kick_fd, loop.scratch):
                ring.kicks += _ONE
    for k in range(rings.shape[0]):
        if rings[k].state == cb.VRING_RUNNING:
            refuse_kicks(rings[k])
    return slept


@kernel
def begin(loop, rings, running):
    """Enter the kernel: rings that run are looked at from here on, and calls that may be missing are made.

    running: int64[n], filled with their indices.
    """
    store_u32(loop.record + _HEARTBEAT, load_u32(loop.record + _HEARTBEAT) + np.uint32(1))
    loop.running = 0
    loop.hot = 0
    loop.since_all = rings.shape[0] + _LOOK_AT_ALL
    for k in range(rings.shape[0]):
        if rings[k].state == cb.VRING_RUNNING:
            running[loop.running] = k
            loop.running += 1
            refuse_kicks(rings[k])
            call_if_wanted(rings[k], loop.one)
    forget_idling(loop)


@kernel
def look_at_all(loop):
    """Whether it is time to look at every ring, or only at the one that had work last.

    A look at all rings takes as long as that many looks at one, so it is done no more often than each so many: then a
    request pays for one look more, however many rings there are. A polite look takes longer, and counts for more.
    """
    loop.since_all += _LOOK_AT_ALL if loop.polite else 1
    if loop.since_all < max(_LOOK_AT_ALL, loop.running):
        return False
    loop.since_all = 0
    return True


@kernel
def forget_idling(loop):
    """There was work."""
    loop.spins = 0
    loop.polite = 0


@kernel
def spin(loop):
    """There was no work: wait for a moment. True when that has lasted so long that sleeping is better."""
    loop.spins += 1
    if loop.spins == 1:
        loop.idle_since_ns = monotonic_ns(loop.scratch)
    if loop.polite:
        libc_sched_yield()
    else:
        spin_hint()
    if loop.spins % _LOOK_AT_CLOCK and not loop.polite and loop.spin_ns > 0:
        return False
    idle = monotonic_ns(loop.scratch) - loop.idle_since_ns
    loop.polite = int64(idle > _POLITE_AFTER_NS)
    return idle >= loop.spin_ns


@kernel
def sleep(loop, rings, pollfds, ready):
    """Sleep until somebody kicks or commands, or one of the device's own files has something.

    ready: the device has something to do already. True when a command has come.
    """
    adapt_spin(loop, ask_and_poll(loop, rings, pollfds, ready))
    forget_idling(loop)
    return pollfds[0].revents != 0
