"""What tests of io_uring share: rings of every set-up, memory that suits O_DIRECT, and requests by the batch."""

import ctypes
import mmap

import numpy as np
from numba import uint64

from kernels import uring
from kernels import uring_layout as layout
from kernels.jit import kernel
from vvupipe.workers.io_uring import MODES, SQPOLL_MODES, IoUring

NAMES = ("defer", "coop", "plain", "sqpoll-single", "sqpoll")
#: An ordinary ring whose record says IOPOLL: a device with polled queues is seldom at hand, its kernels can be run.
AS_IF_POLLED = "as if polled"
EVERY_MODE = dict(zip(NAMES, (*MODES, *SQPOLL_MODES), strict=True))
SQPOLL_IDLE_MS = 5


def open_ring(mode, entries=8):
    """mode: one of EVERY_MODE, AS_IF_POLLED, or anything else for the best."""
    if mode in EVERY_MODE:
        return IoUring(entries, EVERY_MODE[mode], SQPOLL_IDLE_MS)
    ring = IoUring.open(entries)
    if mode == AS_IF_POLLED:
        ring.record["setup_flags"] |= layout.SETUP_IOPOLL
    return ring


class Memory:
    """Page-aligned bytes of this process at `address`."""

    def __init__(self, size_bytes):
        self.bytes = mmap.mmap(-1, size_bytes)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.bytes))

    def __getitem__(self, part):
        return self.bytes[part]

    def __setitem__(self, part, data):
        self.bytes[part] = data


def iovec(*parts):
    """struct iovec[]: (address, bytes) each."""
    return np.array(list(parts), layout.IOVEC)


def push_rw(ring, writing, fd, vector, offset, user_data, *, rw_flags=0, buffer_index=-1):
    length = int(vector["bytes"].sum())
    return uring.push_rw(
        ring.record[0],
        writing,
        fd,
        vector.ctypes.data,
        len(vector),
        length,
        offset,
        rw_flags,
        buffer_index,
        np.uint64(user_data),
    )


def reap(ring, count=64):
    """[(user data, result)] of the completions that are there."""
    user_datas, results = np.zeros(count, np.uint64), np.zeros(count, np.int64)
    found = uring.reap(ring.record[0], user_datas, results)
    return list(zip(user_datas[:found].tolist(), results[:found].tolist(), strict=True))


def finish(ring):
    """Submit, wait for everything, reap."""
    record = ring.record[0]
    waiting = int(record["queued"] + record["in_flight"])
    assert uring.submit(record, waiting) >= 0
    return reap(ring)


@kernel
def read_blocks(ring, fd, iovecs, count, block_bytes, batch, user_datas, results, sums):
    """Read blocks 0 to count - 1 in batches, `batch` of them in flight; sums[block] is the result of its read.

    True when every one completed once. iovecs[k] is where the read in slot k goes; user data is the block.
    """
    submitted = 0
    completed = 0
    while completed < count:
        while submitted < count and submitted - completed < batch:
            vector = uint64(iovecs.ctypes.data) + uint64(16) * uint64(submitted % batch)
            if not uring.push_rw(ring, False, fd, vector, 1, block_bytes, submitted * block_bytes, 0, -1, submitted):
                break
            submitted += 1
        if uring.submit(ring, 1) < 0:
            return False
        for k in range(uring.reap(ring, user_datas, results)):
            block = user_datas[k]
            if block >= uint64(count) or sums[block] != 0:
                return False
            sums[block] = results[k]
            completed += 1
    return ring.in_flight == 0 and ring.queued == 0
