"""A driver ring of kernels.driver_* on plain memory, for tests: what a vCPU process has, without the process."""

import os

import numpy as np

from kernels import driver_layout as layout
from kernels import driver_ring
from kernels.loop_record import POLLFD
from tests.mock.blk_device import BlkDevice

RAM_BYTES = 1 << 20
DESC, AVAIL, USED, TAGS, DATA = 0x1000, 0x3000, 0x4000, 0x8000, 0x20000


class DriverBench:
    def __init__(self, size=16, depth=None, indirect=True, event_idx=True, data_bytes=512, start=0):
        self.size = size
        self.depth = depth or (size if indirect else size // 3)
        self.ram = np.zeros(RAM_BYTES + 4096, np.uint8)
        skip = -self.ram.ctypes.data % 4096
        self.ram = self.ram[skip : skip + RAM_BYTES]
        self.one, self.scratch = np.ones(1, np.uint64), np.zeros(8, np.uint64)
        self.kick_fd, self.call_fd = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2))
        base = self.ram.ctypes.data
        self.rings = np.zeros(1, layout.DRIVER_RING)
        self.ring = self.rings[0]
        for name, value in {
            "ram": base,
            "desc": base + DESC,
            "avail": base + AVAIL,
            "used": base + USED,
            "one": self.one.ctypes.data,
            "scratch": self.scratch.ctypes.data,
            "size": size,
            "event_idx": event_idx,
            "indirect": indirect,
            "kick_fd": self.kick_fd,
            "call_fd": self.call_fd,
        }.items():
            self.ring[name] = value
        numbers = np.arange(self.depth, dtype=np.uint64)
        self.tags = np.zeros(self.depth, layout.TAG)
        self.tags["place"] = np.uint64(base + TAGS) + numbers * np.uint64(layout.TAG_BYTES)
        self.tags["data"] = np.uint64(base + DATA) + numbers * np.uint64(data_bytes)
        self.tags["length"] = data_bytes
        self.heads = np.full(size, -1, np.int32)
        driver_ring.reset_ring(self.ring)
        driver_ring.attach_tags(self.ring, self.tags, self.heads)
        for name in ("avail_idx", "published_idx", "last_used_idx"):
            self.ring[name] = start
        for gpa in (AVAIL + 2, USED + 2):
            self.ram[gpa : gpa + 2] = list(start.to_bytes(2, "little"))
        self.image = bytearray(128 << 10)
        self.device = BlkDevice(memoryview(self.ram), self.image, DESC, AVAIL, USED, size, event_idx, start)
        self.wait = np.zeros(1, layout.WAIT)
        self.record = np.zeros(1, layout.VCPU)
        self.wait["record"] = self.record.ctypes.data
        self.wait["scratch"] = self.scratch.ctypes.data
        self.wait["spin_max_ns"] = self.wait["spin_ns"] = 20_000
        self.pollfds = np.zeros(2, POLLFD)
        self.pollfds["events"] = 1
        self.command_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.pollfds["fd"] = (self.command_fd, -1)
        self.job = np.zeros(1, layout.JOB)
        self.job["depth"] = self.depth
        self.directions = np.zeros(2, layout.DIRECTION)
        self.histograms = np.zeros((2, layout.BUCKETS), np.uint64)

    def close(self):
        for fd in (self.kick_fd, self.call_fd, self.command_fd):
            os.close(fd)

    def set_job(self, **fields):
        for name, value in fields.items():
            self.job[name] = value

    def run(self, kernel):
        """Enter a job's kernel; returns its status."""
        return kernel(
            self.wait[0],
            self.ring,
            self.pollfds,
            self.tags,
            self.heads,
            self.job[0],
            self.record[0],
            self.directions,
            self.histograms,
        )

    def read(self, gpa, size_bytes):
        return self.ram[gpa : gpa + size_bytes].tobytes()
