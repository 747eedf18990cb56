"""A disk for serve_ring, and the model of a block device on an equal image."""

import ctypes
import mmap
import os

import numpy as np

from kernels import control_block as cb
from kernels.blk_disk import BOUNCE_BYTES, BOUNCE_ROOM_BYTES, DISK, GRANULE_SHIFT, VECTOR_BYTES
from kernels.blk_queue import end_some, serve_ring
from kernels.blk_work import BlockWork
from kernels.blk_worker import OWN_POLLFDS, drain
from kernels.loop_record import POLLFD, POLLIN
from kernels.request_record import REQUESTS_MAX
from kernels.ring_record import CHAIN, CHAINS_MAX
from tests.kernels.others import shared
from tests.kernels.ring_pair import ONE
from tests.model.blk import BlockModel
from tests.model.footprint import Footprint
from tests.model.guest_memory import Broken

SERIAL = b"serial number" + bytes(7)

_COPIED = np.zeros((32768, 2), np.uint64)
_SCRATCH = np.zeros(64, np.uint8)
_ROOM = np.zeros(BOUNCE_BYTES, np.uint8)
_ROOMS = mmap.mmap(-1, REQUESTS_MAX * BOUNCE_ROOM_BYTES)  # pages, as direct I/O wants them
_ZEROS = np.zeros(BOUNCE_BYTES, np.uint8)
_SERIAL = np.frombuffer(SERIAL, np.uint8).copy()
_WORKER = np.zeros(1, cb.WORKER)
_VECTOR = np.zeros(VECTOR_BYTES, np.uint8)


class DiskPair:
    """`sectors` of random bytes in a memfd, or in the file `fd`, which is ours from here on.

    mapped: requests are done by copying from and to a mapping of it. others: who does what is not done on the spot
    (tests.kernels.others); None: nobody, the worker does everything by itself.
    """

    def __init__(
        self, sectors, rng, *, mapped=True, read_only=False, bounces=False, abilities=True, others=None, fd=None
    ):
        image = bytearray(rng.randbytes(512 * sectors))
        self.fd = os.memfd_create("image") if fd is None else fd
        os.pwrite(self.fd, image, 0)
        self.model = BlockModel(image, SERIAL, read_only=read_only, can_discard=abilities, can_write_zeroes=abilities)
        self._map = mmap.mmap(self.fd, len(image))
        self.disks = np.zeros(1, DISK)
        disk = self.disks[0]
        disk["fd"], disk["capacity_sectors"], disk["read_only"] = self.fd, sectors, read_only
        disk["id_address"], disk["bounce_address"] = _SERIAL.ctypes.data, _ROOM.ctypes.data
        disk["zeros_address"], disk["zeros_bytes"] = _ZEROS.ctypes.data, BOUNCE_BYTES
        disk["bounce_rooms"], disk["bounces"] = ctypes.addressof(ctypes.c_char.from_buffer(_ROOMS)), bounces
        for name in ("bus_errors", "memory_errors", "disk_errors", "disk_errno"):
            disk[name] = _WORKER.ctypes.data + cb.offset_of(cb.WORKER, name)
        for name in ("can_discard", "can_write_zeroes", "can_punch", "can_zero_range"):
            disk[name] = abilities
        self.others = others or shared("alone")
        if mapped:
            self._view = np.frombuffer(self._map, np.uint8)
            disk["map_address"] = self._view.ctypes.data
            disk["map_bytes"] = len(image)
            disk["map_writable"] = not read_only
            self._granules = np.zeros(-(-len(image) >> GRANULE_SHIFT), np.uint8)
            disk["granules_address"], disk["granules"] = self._granules.ctypes.data, len(self._granules)
            disk["granule_mark"], disk["vector_address"] = 1, _VECTOR.ctypes.data
        self.begin()

    def close(self):
        self._view = None
        self._map.close()
        os.close(self.fd)

    def begin(self):
        """The disk is as it shall be: give it to the others."""
        self.others.begin(self.disks[0])

    def work(self, pair):
        others = self.others
        return BlockWork(
            rings=pair.rings,
            running=np.zeros(1, np.int64),
            disk=self.disks[0],
            regions=pair.regions,
            memory=pair.table,
            segments=others.segments,
            copied=_COPIED,
            board=others.boards[0],
            chains=np.zeros(CHAINS_MAX, CHAIN),
            requests=others.requests,
            uring=others.urings[0],
            buffers=np.zeros((0, 2), np.uint64),
            tokens=others.tokens,
            results=others.results,
            helpers=others.helpers.records,
            scratch=np.uint64(_SCRATCH.ctypes.data),
            one=ONE,
            notice_fd=np.int32(-1),
        )

    def serve_kernel(self, pair):
        """Until nothing is left to do or the ring is broken; returns requests (a broken one counts)."""
        done = 0
        while pair.rings[0]["state"] == cb.VRING_RUNNING:
            some = self.serve_turn(pair)
            ended = self.end_some(pair)
            if not some and not ended and not self.others.boards[0]["under_way"]:
                break
            done += some
        return done

    def serve_turn(self, pair, index=0):
        """One turn of a ring. Returns how many requests were taken."""
        return serve_ring(self.work(pair), pair.rings[index])

    def end_some(self, pair):
        """End what is done by now. Returns how many requests ended."""
        return end_some(self.work(pair))

    def drain(self, pair):
        """Wait until nothing is under way, as a worker does."""
        pollfds = np.zeros(1 + len(pair.rings) + OWN_POLLFDS, POLLFD)
        pollfds["fd"], pollfds["events"] = [-1] * (1 + len(pair.rings)) + self.others.poll_fds, POLLIN
        drain(pollfds, self.work(pair))

    def serve_model(self, pair):
        """Returns (requests, the rule that was broken or None)."""
        self.model.footprint = Footprint(pair.place, pair.packed)
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
