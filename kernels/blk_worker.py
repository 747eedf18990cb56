"""The kernel of a block worker: serve its vrings, wait when there is nothing to do.

Returns to the interpreter for one reason only: a command of the coordinator is waiting.
"""

import numpy as np
from numba import int32, int64, uint64

from kernels import control_block as cb
from kernels.blk_queue import serve_ring
from kernels.jit import kernel
from kernels.memory import load_u64
from kernels.status import ERR_MEMORY_GONE
from kernels.vring import break_ring
from kernels.worker_loop import begin, command_waiting, forget_idling, wait_a_little

_BUS_ERRORS = np.uint64(cb.offset_of(cb.WORKER, "bus_errors"))
_BUS_ADDRESS = np.uint64(cb.offset_of(cb.WORKER, "bus_error_address"))


@kernel
def check_memory(loop, rings, disk):
    """After a SIGBUS: a fault in the image ends its mapping, one in guest memory breaks every ring on it."""
    count = load_u64(loop.record + _BUS_ERRORS)
    if count == loop.bus_errors_seen:
        return
    loop.bus_errors_seen = count
    address = load_u64(loop.record + _BUS_ADDRESS)
    if disk.map_bytes != 0 and address - disk.map_start < disk.map_bytes:
        disk.map_address = uint64(0)
        return
    for k in range(rings.shape[0]):
        if rings[k].state in (cb.VRING_RUNNING, cb.VRING_WAITING):
            break_ring(rings[k], ERR_MEMORY_GONE, loop.one)


@kernel
def serve_all(loop, rings, disk, regions, memory, segments, copied):
    """One turn for every running ring. Returns requests done."""
    done = int64(0)
    for k in range(rings.shape[0]):
        ring = rings[k]
        if ring.state == cb.VRING_RUNNING:
            done += serve_ring(
                ring, disk, regions, memory, segments, copied, loop.scratch, loop.one, int32(loop.notice_fd)
            )
    return done


@kernel
def serve(loop, rings, pollfds, disk, regions, memory, segments, copied):
    """Serve `rings` until a command waits. Everything is an array or record of this process.

    loop: worker_loop.LOOP. rings: RING[n]. pollfds: POLLFD[n + 1], entry 0 set. disk: DISK. regions: uint64[m, 5], what
    drivers' addresses mean; memory: uint64[m, 5], the memory table. segments: uint64[2 * SEGMENTS_MAX, 2]. copied:
    uint64[32768, 2], a chain copied out of its ring.
    """
    begin(loop, rings)
    while not command_waiting(loop):
        done = serve_all(loop, rings, disk, regions, memory, segments, copied)
        check_memory(loop, rings, disk)
        if done:
            forget_idling(loop)
        elif wait_a_little(loop, rings, pollfds):
            return
