"""What the process of a block worker calls (see object_file): each takes addresses and numbers, 64-bit words."""

import numpy as np
from numba import int32, int64, uint16, uint64

from kernels import blk_worker, vring
from kernels.blk_disk import DISK
from kernels.blk_helper import help_worker
from kernels.blk_parts import PARTS
from kernels.blk_queue import serve_ring
from kernels.blk_work import BlockWork
from kernels.bus_error import survive_bus_error
from kernels.helper_record import HELPER
from kernels.jit import spliced
from kernels.loop_record import LOOP, POLLFD
from kernels.memory import records_at, store_u64, table_at
from kernels.region_table import COLUMNS
from kernels.request_record import BOARD, REQUEST, REQUESTS_MAX, SEGMENT_ROWS
from kernels.ring_record import CHAIN, CHAINS_MAX, RING
from kernels.stages import start_stages
from kernels.uring_layout import URING
from kernels.virtio_layout import QUEUE_SIZE_MAX

_I8 = np.int64
_U8 = np.uint64


@spliced
def work_of(parts):
    """The BlockWork that PARTS tell of."""
    return BlockWork(
        rings=records_at(parts.rings, parts.num_rings, RING),
        running=records_at(parts.running, parts.num_rings, _I8),
        disk=records_at(parts.disk, int64(1), DISK)[0],
        regions=table_at(parts.regions, parts.num_regions, int64(COLUMNS)),
        memory=table_at(parts.memory, parts.num_memory, int64(COLUMNS)),
        segments=table_at(parts.segments, int64(SEGMENT_ROWS), int64(2)),
        copied=table_at(parts.copied, int64(QUEUE_SIZE_MAX), int64(2)),
        board=records_at(parts.board, int64(1), BOARD)[0],
        chains=records_at(parts.chains, int64(CHAINS_MAX), CHAIN),
        requests=records_at(parts.requests, int64(REQUESTS_MAX), REQUEST),
        uring=records_at(parts.uring, int64(1), URING)[0],
        buffers=table_at(parts.buffers, parts.num_buffers, int64(2)),
        tokens=records_at(parts.tokens, int64(REQUESTS_MAX), _U8),
        results=records_at(parts.results, int64(REQUESTS_MAX), _I8),
        helpers=records_at(parts.helpers, parts.num_helpers, HELPER),
        scratch=parts.scratch,
        one=parts.one,
        notice_fd=int32(parts.notice_fd),
    )


def serve(parts):
    """blk_worker.serve. parts: address of a PARTS."""
    each = records_at(parts, int64(1), PARTS)[0]
    loop = records_at(each.loop, int64(1), LOOP)[0]
    blk_worker.serve(loop, records_at(each.pollfds, each.num_pollfds, POLLFD), work_of(each))
    return 0


def drain(parts):
    """blk_worker.drain. parts: address of a PARTS."""
    each = records_at(parts, int64(1), PARTS)[0]
    blk_worker.drain(records_at(each.pollfds, each.num_pollfds, POLLFD), work_of(each))
    return 0


def serve_again(parts, index):
    """What is to be done again in one ring, as far as there is room, and the call that whoever died may owe its driver.

    Returns how many are left. parts: address of a PARTS.
    """
    work = work_of(records_at(parts, int64(1), PARTS)[0])
    ring = work.rings[int64(index)]
    if ring.resubmit_next < ring.resubmit_count:
        serve_ring(work, ring)
    vring.call_if_wanted(ring, work.one)
    return ring.resubmit_count - ring.resubmit_next


def help_with(parts, index, disk):
    """blk_helper.help_worker, which never returns. disk: address of the helper's own DISK."""
    each = records_at(parts, int64(1), PARTS)[0]
    help_worker(
        records_at(each.helpers, each.num_helpers, HELPER),
        int64(index),
        records_at(each.requests, int64(REQUESTS_MAX), REQUEST),
        table_at(each.segments, int64(SEGMENT_ROWS), int64(2)),
        records_at(disk, int64(1), DISK)[0],
    )
    return 0


def count_stages(record, scratch):
    """stages.start_stages."""
    start_stages(record, scratch)
    return 0


def on_bus_error(number, info, context):
    """A `sa_sigaction` (sigaction(2)) for SIGBUS."""
    survive_bus_error(info)
    return 0


def place_ring(ring, memory, num_memory, translations, num_translations, desc, avail, used):
    """vring.place_ring, of tables with so many rows. Returns OK, MISS or ERR_*."""
    return vring.place_ring(
        records_at(ring, int64(1), RING)[0],
        table_at(memory, int64(num_memory), int64(COLUMNS)),
        table_at(translations, int64(num_translations), int64(COLUMNS)),
        desc,
        avail,
        used,
    )


def resume(ring, base, heads, counters, found):
    """vring.resume, with room for as many as the ring has. found: address of the number that is found."""
    each = records_at(ring, int64(1), RING)[0]
    status, count = vring.resume(
        each, uint16(base), records_at(heads, each.size, _I8), records_at(counters, each.size, _U8)
    )
    store_u64(found, uint64(count))
    return status


def publish(ring, one):
    """vring.publish."""
    vring.publish(records_at(ring, int64(1), RING)[0], one)
    return 0


def want_kicks(ring):
    """vring.want_kicks. Returns 1 when there is work already."""
    return int64(vring.want_kicks(records_at(ring, int64(1), RING)[0]))


def set_state(ring, state):
    """vring.set_state."""
    vring.set_state(records_at(ring, int64(1), RING)[0], int64(state))
    return 0


ENTRIES = (
    serve,
    drain,
    serve_again,
    help_with,
    count_stages,
    on_bus_error,
    place_ring,
    resume,
    publish,
    want_kicks,
    set_state,
)
