"""The kernel of a block worker: serve its vrings, wait when there is nothing to do.

Returns to the interpreter for one reason only: a command of the coordinator is waiting.
"""

import numpy as np
from numba import int32, int64, uint64

from kernels import control_block as cb
from kernels import stage_layout as stage
from kernels import uring
from kernels.blk_queue import end_some, serve_ring
from kernels.jit import kernel, spliced
from kernels.memory import drain_eventfd, libc_poll, load_u64
from kernels.stages import lap
from kernels.status import ERR_MEMORY_GONE
from kernels.vring import break_ring, fetch_next
from kernels.worker_loop import begin, command_waiting, forget_idling, look_at_all, sleep, spin

#: Entries of `pollfds` behind those of the rings: the eventfds of io_uring and of the helpers.
OWN_POLLFDS = 2

#: Looks that found nothing; before, the driver may be writing what it put last.
_FETCH_AFTER = 2

_MEMORY_ERRORS = np.uint64(cb.offset_of(cb.WORKER, "memory_errors"))
_ZERO = np.uint64(0)


@kernel
def check_memory(loop, work):
    """Break every ring after a SIGBUS in guest memory: what was to be there is lost, and nothing is answered."""
    if load_u64(loop.record + _MEMORY_ERRORS) == _ZERO:
        return
    for k in range(work.rings.shape[0]):
        if work.rings[k].state in (cb.VRING_RUNNING, cb.VRING_WAITING):
            break_ring(work.rings[k], ERR_MEMORY_GONE, loop.one)


@spliced
def serve_some(loop, work):
    """One turn: for the ring that had work last, now and then for every running one. Returns requests taken."""
    if not look_at_all(loop):
        ring = work.rings[work.running[loop.hot]]
        if loop.spins > _FETCH_AFTER:
            fetch_next(ring)
        done = serve_ring(work, ring) if ring.state == cb.VRING_RUNNING else int64(0)
        loop.since_all += done
        return done
    total = int64(0)
    for k in range(loop.running):
        ring = work.rings[work.running[k]]
        if ring.state == cb.VRING_RUNNING:
            done = serve_ring(work, ring)
            if done:
                loop.hot = k
                total += done
    return total


@kernel
def want_wakes(work):
    """Have io_uring tell by its eventfd what it has done; helpers always do. True when it has something already."""
    return work.uring.fd >= 0 and uring.want_wakes(work.uring)


@kernel
def hear(work, pollfds):
    """Awake again: reset the eventfds that were written."""
    if work.uring.fd >= 0:
        uring.refuse_wakes(work.uring)
    for k in range(pollfds.shape[0] - OWN_POLLFDS, pollfds.shape[0]):
        if pollfds[k].revents:
            drain_eventfd(pollfds[k].fd, work.scratch)
            pollfds[k].revents = np.int16(0)


@spliced
def serve(loop, pollfds, work):
    """Serve work.rings until a command waits. Requests may be under way when this returns.

    loop: loop_record.LOOP. pollfds: POLLFD[n + 1 + OWN_POLLFDS], entry 0 and the last ones set. work: BlockWork.
    """
    begin(loop, work.rings, work.running)
    lap(work.board, stage.COMMANDS)
    while not command_waiting(loop):
        done = serve_some(loop, work) if loop.running else int64(0)
        if work.board.under_way:
            done += end_some(work)
        check_memory(loop, work)
        if done:
            forget_idling(loop)
        elif spin(loop):
            lap(work.board, stage.SPIN)
            commanded = sleep(loop, work.rings, pollfds, want_wakes(work))
            hear(work, pollfds)
            lap(work.board, stage.SLEEP)
            if commanded:
                return
        else:
            lap(work.board, stage.SPIN)


@kernel
def drain(pollfds, work):
    """Wait until nothing is under way. pollfds: as for `serve`; only the device's own entries are looked at."""
    own = uint64(pollfds.ctypes.data) + uint64(pollfds.itemsize) * uint64(pollfds.shape[0] - OWN_POLLFDS)
    while work.board.under_way:
        if end_some(work) == 0:
            if not want_wakes(work):
                libc_poll(own, uint64(OWN_POLLFDS), int32(-1))
            hear(work, pollfds)
