"""Vrings and the disk of a worker in this process, for drivers of tests.mock.blk_batch."""

import contextlib
import random

import numpy as np

from kernels import control_block as cb
from kernels import status, vring
from kernels.inflight_layout import part_bytes
from kernels.inflight_packed import list_inflight as list_packed
from kernels.inflight_split import list_inflight as list_split
from kernels.ring_record import RING
from tests.kernels.disk_pair import DiskPair
from tests.mock.blk_batch import BlkBatch
from tests.mock.driver_ring import DriverRing
from tests.mock.guest_memory import GuestMemory
from tests.mock.packed_ring import PackedRing

MEMORY_BYTES = 32 << 20


class BatchDisk:
    """`batches[k]` is the driver of ring k. The image has `sectors` of random bytes: `content`."""

    def __init__(self, others, *, packed=False, size=1024, sectors=2048, rings=1, in_order=False, prepare=None, **disk):
        """prepare: changes a DISK; what is not named here is DiskPair's."""
        self.memory = GuestMemory(((0, MEMORY_BYTES),))
        self._view = np.frombuffer(self.memory._maps[0], np.uint8)
        uva = self.memory.regions[0][2]
        self.table = np.array([[0, MEMORY_BYTES, self._view.ctypes.data, uva, 3]], np.uint64)
        self.regions = self.table
        self.packed = packed
        kind = PackedRing if packed else DriverRing
        self.batches = [BlkBatch(kind(self.memory, size)) for _ in range(rings)]
        self.records = np.zeros(rings, cb.VRING)
        self._inflight = np.zeros((rings, part_bytes(size, packed=packed) // 8), np.uint64)
        self.rings = np.zeros(rings, RING)
        for index in range(rings):
            self.records[index]["state"] = cb.VRING_RUNNING
            self._start(index, in_order)
        disk.setdefault("mapped", False)
        self.disk = DiskPair(sectors, random.Random(1), others=others, **disk)
        if prepare:
            prepare(self.disk.disks[0])
            self.disk.begin()
        self.content = bytes(self.disk.model.image)

    def _start(self, index, in_order):
        ring, driver = self.rings[index], self.batches[index].ring
        ring["index"], ring["size"], ring["packed"], ring["in_order"] = index, driver.size, self.packed, in_order
        ring["record"] = self.records[index : index + 1].ctypes.data
        ring["inflight"] = self._inflight[index].ctypes.data
        ring["kick_fd"], ring["call_fd"], ring["err_fd"] = driver.kick_fd, driver.call_fd, driver.err_fd
        ring["log_fd"] = -1
        ring["signalled_valid"], ring["state"] = 1, cb.VRING_RUNNING
        parts = (np.uint64(self.memory.to_uva(part)) for part in (driver.desc, driver.avail, driver.used))
        assert vring.place_ring(ring, self.table, self.regions, *parts) == status.OK
        heads, counters = np.zeros(driver.size, np.int64), np.zeros(driver.size, np.uint64)
        base = np.uint16(PackedRing.START if self.packed else 0)
        assert vring.resume(ring, base, heads, counters) == (status.OK, 0)

    @property
    def batch(self):
        return self.batches[0]

    @property
    def board(self):
        return self.disk.others.boards[0]

    def serve(self):
        """One turn of every ring, and what is done by now."""
        for index in range(len(self.rings)):
            self.disk.serve_turn(self, index)
        self.disk.end_some(self)

    def serve_all(self):
        """Until nothing is available and nothing under way; by who is there to do it."""
        while True:
            taken = sum(self.disk.serve_turn(self, index) for index in range(len(self.rings)))
            self.disk.drain(self)
            if not taken:
                break
        for batch in self.batches:
            batch.look()

    def inflight(self, index=0):
        """How many heads the inflight region of a ring has."""
        size = int(self.rings[index]["size"])
        heads, counters = np.zeros(size, np.int64), np.zeros(size, np.uint64)
        found = (list_packed if self.packed else list_split)(self.rings[index], heads, counters)
        return found[0] if self.packed else found

    def check_done(self):
        """Everything was used once, nothing is left anywhere."""
        for index, batch in enumerate(self.batches):
            batch.look()
            assert not batch.under_way
            assert self.inflight(index) == 0
            ring = self.rings[index]
            assert ring["state"] == cb.VRING_RUNNING
            assert ring["under_way"] == ring["unpublished"] == ring["blocked"] == 0
            assert ring["requests"] == len(batch.done)
            assert ring["errors"] == sum(request.status != 0 for request in batch.done)
        self.disk.others.check_idle()

    def close(self):
        self.disk.close()
        self._view = None
        for batch in self.batches:
            batch.ring.close()
        self.memory.close()


@contextlib.contextmanager
def batch_disk(others, **options):
    world = BatchDisk(others, **options)
    try:
        yield world
    finally:
        world.close()
