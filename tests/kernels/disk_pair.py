"""A disk for serve_ring, and the model of a block device on an equal image."""

import mmap
import os

import numpy as np

from kernels import control_block as cb
from kernels.blk_bounce import BOUNCE_BYTES
from kernels.blk_disk import DISK
from kernels.blk_queue import serve_ring
from kernels.chain import SEGMENTS_MAX
from tests.kernels.ring_pair import ONE
from tests.model.blk import BlockModel
from tests.model.guest_memory import Broken

SERIAL = b"serial number" + bytes(7)

_SEGMENTS = np.zeros((2 * SEGMENTS_MAX, 2), np.uint64)
_COPIED = np.zeros((32768, 2), np.uint64)
_SCRATCH = np.zeros(64, np.uint8)
_ROOM = np.zeros(BOUNCE_BYTES, np.uint8)
_ZEROS = np.zeros(BOUNCE_BYTES, np.uint8)
_SERIAL = np.frombuffer(SERIAL, np.uint8).copy()
_WORKER = np.zeros(1, cb.WORKER)


class DiskPair:
    """`sectors` of random bytes in a memfd. mapped: reads copy out of a mapping of it."""

    def __init__(self, sectors, rng, *, mapped=True, read_only=False, bounces=False, abilities=True):
        image = bytearray(rng.randbytes(512 * sectors))
        self.fd = os.memfd_create("image")
        os.write(self.fd, image)
        self.model = BlockModel(image, SERIAL, read_only=read_only, can_discard=abilities, can_write_zeroes=abilities)
        self._map = mmap.mmap(self.fd, len(image), prot=mmap.PROT_READ)
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

    def close(self):
        self._view = None
        self._map.close()
        os.close(self.fd)

    def serve_kernel(self, pair):
        """Until nothing is left to do or the ring is broken; returns requests (a broken one counts)."""
        done = 0
        while pair.rings[0]["state"] == cb.VRING_RUNNING:
            some = serve_ring(
                pair.rings[0],
                self.disks[0],
                pair.regions,
                pair.table,
                _SEGMENTS,
                _COPIED,
                np.uint64(_SCRATCH.ctypes.data),
                ONE,
                np.int32(-1),
            )
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
