"""A disk for serve_ring, and the model of a block device on an equal image."""

import mmap
import os

import numpy as np

from kernels import control_block as cb
from kernels.blk_bounce import BOUNCE_BYTES
from kernels.blk_disk import DISK
from kernels.blk_queue import serve_ring
from kernels.blk_work import BlockWork
from kernels.helper import HELPER
from kernels.image_map import GRANULE_SHIFT, VECTOR_BYTES
from kernels.request import BOARD, COPIES_MAX, REQUEST, REQUESTS_MAX, SEGMENT_ROWS, lay_out
from kernels.uring_layout import URING
from tests.kernels.ring_pair import ONE
from tests.model.blk import BlockModel
from tests.model.guest_memory import Broken

SERIAL = b"serial number" + bytes(7)

_SEGMENTS = np.zeros((SEGMENT_ROWS, 2), np.uint64)
_COPIED = np.zeros((32768, 2), np.uint64)
_SCRATCH = np.zeros(64, np.uint8)
_ROOM = np.zeros(BOUNCE_BYTES, np.uint8)
_ZEROS = np.zeros(BOUNCE_BYTES, np.uint8)
_SERIAL = np.frombuffer(SERIAL, np.uint8).copy()
_WORKER = np.zeros(1, cb.WORKER)
_VECTOR = np.zeros(VECTOR_BYTES, np.uint8)
_REQUESTS = np.zeros(REQUESTS_MAX, REQUEST)
_BOARD = np.zeros(1, BOARD)
_URING = np.zeros(1, URING)
_URING["fd"] = -1
lay_out(_BOARD, _REQUESTS)


class DiskPair:
    """`sectors` of random bytes in a memfd. mapped: reads copy out of a mapping of it."""

    def __init__(self, sectors, rng, *, mapped=True, read_only=False, bounces=False, abilities=True):
        image = bytearray(rng.randbytes(512 * sectors))
        self.fd = os.memfd_create("image")
        os.write(self.fd, image)
        self.model = BlockModel(image, SERIAL, read_only=read_only, can_discard=abilities, can_write_zeroes=abilities)
        self._map = mmap.mmap(self.fd, len(image))
        self.disks = np.zeros(1, DISK)
        disk = self.disks[0]
        disk["fd"], disk["capacity_sectors"], disk["read_only"] = self.fd, sectors, read_only
        disk["id_address"], disk["bounce_address"] = _SERIAL.ctypes.data, _ROOM.ctypes.data
        disk["zeros_address"], disk["zeros_bytes"] = _ZEROS.ctypes.data, BOUNCE_BYTES
        disk["bounces"] = bounces
        disk["bus_errors"] = _WORKER.ctypes.data + cb.offset_of(cb.WORKER, "bus_errors")
        for name in ("can_discard", "can_write_zeroes", "can_punch", "can_zero_range"):
            disk[name] = abilities
        if mapped:
            self._view = np.frombuffer(self._map, np.uint8)
            disk["map_address"] = disk["map_start"] = self._view.ctypes.data
            disk["map_bytes"] = len(image)
            disk["map_writable"] = not read_only
            self._granules = np.zeros(-(-len(image) >> GRANULE_SHIFT), np.uint8)
            disk["granules_address"], disk["granules"] = self._granules.ctypes.data, len(self._granules)
            disk["granule_mark"], disk["vector_address"] = 1, _VECTOR.ctypes.data

    def close(self):
        self._view = None
        self._map.close()
        os.close(self.fd)

    def work(self, pair):
        """Without io_uring and helpers: a worker does everything by itself."""
        return BlockWork(
            rings=pair.rings,
            running=np.zeros(1, np.int64),
            disk=self.disks[0],
            regions=pair.regions,
            memory=pair.table,
            segments=_SEGMENTS,
            copied=_COPIED,
            board=_BOARD[0],
            requests=_REQUESTS,
            copies=np.zeros(COPIES_MAX, np.int64),
            uring=_URING[0],
            tokens=np.zeros(1, np.uint64),
            results=np.zeros(1, np.int64),
            helpers=np.zeros(0, HELPER),
            scratch=np.uint64(_SCRATCH.ctypes.data),
            one=ONE,
            notice_fd=np.int32(-1),
        )

    def serve_kernel(self, pair):
        """Until nothing is left to do or the ring is broken; returns requests (a broken one counts)."""
        done = 0
        while pair.rings[0]["state"] == cb.VRING_RUNNING:
            some = serve_ring(self.work(pair), pair.rings[0])
            if not some:
                break
            done += some
        return done

    def serve_model(self, pair):
        """Returns (requests, the rule that was broken or None)."""
        done = 0
        try:
            while pair.model.available():
                self.model.serve_one(pair.model)
                done += 1
        except Broken as rule:
            pair.model.publish()
            return done, rule.args[0]
        if done:
            pair.model.publish()
        return done, None

    def image(self):
        return os.pread(self.fd, len(self.model.image) + 1, 0)
