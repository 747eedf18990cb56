"""A front-end with any number of vrings and memory regions, of which one vring is busy.

The messages are those of tests/mock (plain blocking sockets, ADD_MEM_REG included); the busy vring is driven by a vCPU
of the embedded sibling.
"""

from __future__ import annotations

import contextlib
import os
import struct
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from kernels.driver_layout import RANDOM, SEQUENTIAL
from kernels.virtio_layout import BLK_T_IN, SECTOR_BYTES
from perf.backends import Running
from perf.processes import scheduled_seconds, tree
from tests.mock import frontend as mock
from vvupipe.memory import shared
from vvupipe.vm.latency_report import Latency
from vvupipe.vm.sibling_layout import UVA_BASE, RamLayout
from vvupipe.vm.vcpu import ControlMemory, Vcpu

QUEUE_SIZE = 256
MEM_BYTES = 256 << 20
BLOCK_BYTES = 4096
TABLE_REGIONS_MAX = 8  # of SET_MEM_TABLE; more are added one by one
_PAGE = 4096
_SWEEP_DEPTH = 32


@dataclass(frozen=True)
class Point:
    """What one measurement gave, for a request of 4 KiB."""

    wall_us: float  #: time divided by requests
    cpu_us: float  #: CPU time of the back-end's processes divided by requests
    p50_us: float
    requests: int


def cut(size_bytes: int, regions: int, first_bytes: int) -> list[tuple[int, int]]:
    """(start, bytes) of `regions` pieces of the RAM; the first holds at least `first_bytes`, the rings among them."""
    if regions == 1:
        return [(0, size_bytes)]
    share = (size_bytes - first_bytes) // (regions - 1) // _PAGE * _PAGE
    pieces = [(0, first_bytes)]
    pieces += [(first_bytes + k * share, share) for k in range(regions - 1)]
    last = pieces[-1][0]
    return [*pieces[:-1], (last, size_bytes - last)]


class GrowthFrontEnd:
    """Connected to a back-end, `vrings` started, vring `busy` driven. Made by `connected`."""

    def __init__(self, running: Running, vcpu: Vcpu, layout: RamLayout, first_bytes: int) -> None:
        self._running = running
        self._vcpu = vcpu
        self._place = layout.vrings[0]
        self._first_bytes = first_bytes

    async def measure(
        self, seconds: float, depth: int, *, range_bytes: int, stride_bytes: int = BLOCK_BYTES, over_regions: int = 1
    ) -> Point:
        """Random reads of the blocks 0, stride, 2 * stride, ... below `range_bytes` of the disk.

        over_regions: the buffers of the requests lie in as many regions, as far as the depth allows.
        """
        job = {"runtime_ns": int(seconds * 1e9), "order": RANDOM, "random": time.monotonic_ns()}
        return await self._run(job, depth, range_bytes // stride_bytes, stride_bytes, over_regions)

    async def sweep(self, *, range_bytes: int, stride_bytes: int = BLOCK_BYTES) -> None:
        """Read each of those blocks once, so that all are in memory and mapped."""
        blocks = range_bytes // stride_bytes
        await self._run({"order": SEQUENTIAL, "limit": blocks}, _SWEEP_DEPTH, blocks, stride_bytes, 1)

    async def _run(self, job: dict[str, int], depth: int, blocks: int, stride_bytes: int, over_regions: int) -> Point:
        data_gpa, buffer_stride = self._buffers(depth, over_regions)
        place = {"blocks": blocks, "block_bytes": BLOCK_BYTES, "block_sectors": stride_bytes // SECTOR_BYTES}
        fields = {
            "kernel": "workload",
            "depth": depth,
            "tags_gpa": self._place.tags_gpa,
            "data_gpa": data_gpa,
            "stride_bytes": buffer_stride,
            "length_bytes": BLOCK_BYTES,
            "job": {**job, **place, "first_sector": 0, "only": BLK_T_IN},
        }
        processes = tree(self._running.pids)
        before = scheduled_seconds(processes)
        await self._vcpu.command("job", fields)
        await self._vcpu.job_done()
        used = scheduled_seconds(processes) - before
        self._vcpu.check_ring()
        return self._point(used)

    def _buffers(self, depth: int, regions: int) -> tuple[int, int]:
        """(where the first buffer is, bytes to the next)."""
        if regions == 1:
            return self._place.data_gpa, BLOCK_BYTES
        room = MEM_BYTES - self._first_bytes
        return self._first_bytes, room // depth // _PAGE * _PAGE

    def _point(self, used_s: float) -> Point:
        counters = self._vcpu.counters()
        reads = counters.directions[0]
        if counters.record["errors"] or not reads["requests"]:
            raise SystemExit(f"{counters.record['errors']} of {reads['requests']} requests failed")
        latency = Latency(
            [int(count) for count in counters.histograms[0]],
            reads["latency_sum_ns"],
            reads["latency_min_ns"],
            reads["latency_max_ns"],
        )
        requests = reads["requests"]
        wall_ns = counters.record["ended_ns"] - counters.record["started_ns"]
        return Point(wall_ns / 1e3 / requests, used_s * 1e6 / requests, latency.percentile_ns(50) / 1e3, requests)


@contextlib.asynccontextmanager
async def connected(
    running: Running, cpu: int, *, vrings: int = 1, regions: int = 1, spin_us: int = 200
) -> AsyncIterator[GrowthFrontEnd]:
    """A front-end of the back-end `running`, its vCPU on `cpu`; vring 0 is the busy one."""
    layout = RamLayout(MEM_BYTES, vrings, QUEUE_SIZE)
    first_bytes = layout.vrings[0].data_gpa
    ram_fd = shared.create_unnamed(MEM_BYTES)
    control = ControlMemory(1)
    vcpu = Vcpu(0, cpu, control, spin_us * 1000)
    link = mock.Frontend(str(running.socket), timeout_s=30)
    fds: list[int] = []
    try:
        await vcpu.start(ram_fd, MEM_BYTES)
        features = mock.F_VERSION_1 | mock.F_PROTOCOL_FEATURES | mock.F_EVENT_IDX | mock.F_INDIRECT | mock.F_BLK_FLUSH
        link.negotiate(features, mock.MQ | mock.REPLY_ACK | mock.CONFIG | mock.MEM_SLOTS)
        _set_memory(link, ram_fd, cut(MEM_BYTES, regions, first_bytes))
        for index in range(vrings):
            kick, call, err = (os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(3))
            fds += [kick, call, err]
            _start_vring(link, index, layout, kick, call, err)
            if index == 0:
                ring = layout.vrings[0].rings[0]
                parts = {"desc_gpa": ring.desc_gpa, "avail_gpa": ring.avail_gpa, "used_gpa": ring.used_gpa}
                await vcpu.command("ring", {**parts, "size": QUEUE_SIZE, "event_idx": True, "indirect": True}, fds[:2])
        await vcpu.command("go")
        yield GrowthFrontEnd(running, vcpu, layout, first_bytes)
    finally:
        await vcpu.close()
        link.close()
        control.close()
        for fd in (ram_fd, *fds):
            os.close(fd)


def _set_memory(link: Any, ram_fd: int, pieces: list[tuple[int, int]]) -> None:
    entries = [struct.pack("=QQQQ", start, size, UVA_BASE + start, start) for start, size in pieces]
    table = entries if len(entries) <= TABLE_REGIONS_MAX else []
    if table:
        link.tell(mock.SET_MEM_TABLE, struct.pack("=II", len(table), 0) + b"".join(table), [ram_fd] * len(table))
        return
    for entry in entries:
        link.tell(mock.ADD_MEM_REG, struct.pack("=Q", 0) + entry, [ram_fd])


def _start_vring(link: Any, index: int, layout: RamLayout, kick: int, call: int, err: int) -> None:
    ring = layout.vrings[index].rings[0]
    places = (UVA_BASE + ring.desc_gpa, UVA_BASE + ring.used_gpa, UVA_BASE + ring.avail_gpa)
    link.tell(mock.SET_VRING_NUM, struct.pack("=II", index, QUEUE_SIZE))
    link.tell(mock.SET_VRING_ADDR, struct.pack("=IIQQQQ", index, 0, *places, 0))
    link.tell(mock.SET_VRING_BASE, struct.pack("=II", index, 0))
    for request, fd in ((mock.SET_VRING_ERR, err), (mock.SET_VRING_CALL, call), (mock.SET_VRING_KICK, kick)):
        link.tell(request, struct.pack("=Q", index), [fd])
    link.enable(index, 1)
