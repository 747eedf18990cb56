"""How a vCPU waits for its device: spin, then let others have the CPU, then sleep until the device calls."""

import numpy as np
from numba import int32, int64, uint64

from kernels import driver_layout as layout
from kernels.driver_ring import drain_call, refuse_calls, want_calls
from kernels.jit import kernel
from kernels.memory import libc_poll, libc_sched_yield, load_acquire_u32, monotonic_ns, spin_hint
from kernels.spin_time import adapt_spin

_ATTENTION = np.uint64(layout.VCPU.fields["attention"][1])
_POLITE_AFTER_NS = 5_000  # from then on let others have the CPU between two looks
_LOOK_AT_CLOCK = 15  # a mask: spins between two looks at the clock


@kernel
def command_waiting(wait):
    """Whether the parent raised the attention word."""
    return load_acquire_u32(wait.record + _ATTENTION) != wait.attention_seen


@kernel
def forget_idling(wait):
    """There was work: the next wait starts afresh."""
    wait.spins = 0
    wait.idle_since_ns = 0
    wait.polite = 0


@kernel
def sleep(wait, ring, pollfds):
    """Sleep until a call or a command. Returns nanoseconds asleep; 0: there was work already."""
    pollfds[0].revents = np.int16(0)
    slept = int64(0)
    if not want_calls(ring) and not command_waiting(wait):
        wait.sleeps += uint64(1)
        pollfds[1].fd = ring.call_fd
        before = monotonic_ns(wait.scratch)
        libc_poll(uint64(pollfds.ctypes.data), uint64(2), int32(-1))
        slept = monotonic_ns(wait.scratch) - before
        if pollfds[1].revents:
            drain_call(ring)
    refuse_calls(ring)
    return slept


@kernel
def wait_a_little(wait, ring, pollfds):
    """Nothing is used: one spin, one yield or one sleep. True when a command is waiting on the socket."""
    wait.spins += 1
    if wait.polite:
        libc_sched_yield()
    else:
        spin_hint()
        if wait.spins & _LOOK_AT_CLOCK and wait.spin_ns > 0:
            return False
    now = monotonic_ns(wait.scratch)
    if wait.idle_since_ns == 0:
        wait.idle_since_ns = now
    idle = now - wait.idle_since_ns
    wait.polite = int64(idle > _POLITE_AFTER_NS)
    if idle < wait.spin_ns:
        return False
    adapt_spin(wait, sleep(wait, ring, pollfds))
    forget_idling(wait)
    return pollfds[0].revents != 0
