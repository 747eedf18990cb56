"""The block device's part of a worker process: the open image and the kernel that serves it."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import mmap
import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from kernels import control_block as layout
from kernels import request_record as request
from kernels.blk_disk import BOUNCE_BYTES, BOUNCE_ROOM_BYTES, DISK, GRANULE_SHIFT, VECTOR_BYTES
from kernels.blk_parts import PARTS
from kernels.region_table import ADDRESS, SIZE
from kernels.ring_record import CHAIN, CHAINS_MAX
from kernels.uring_layout import URING
from kernels.virtio_layout import BLK_ID_BYTES, QUEUE_SIZE_MAX, SECTOR_BYTES
from vvupipe.errors import WorkerError
from vvupipe.memory.mapping import Mapping
from vvupipe.workers import bus_error_handler, commands, process
from vvupipe.workers.helpers import Helpers
from vvupipe.workers.io_uring import IoUring
from vvupipe.workers.kernel_library import KernelLibrary
from vvupipe.workers.worker_memory import Table

log = logging.getLogger(__name__)

#: fields of DISK that the coordinator sets
_FROM_COORDINATOR = (
    "read_only",
    "direct",
    "unsafe",
    "is_block",
    "logical_bytes",
    "can_discard",
    "can_write_zeroes",
    "can_punch",
    "can_zero_range",
    "nowait",
    "merge_bytes",
    "map_always",
)


@contextlib.contextmanager
def _on_other_cpus() -> Iterator[None]:
    """Threads of the kernel that are made meanwhile do not share our CPU, if the coordinator has others."""
    own = os.sched_getaffinity(0)
    if others := os.sched_getaffinity(os.getppid()) - own:
        os.sched_setaffinity(0, others)
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)


class BlockKernel:
    """Implements process.DeviceKernel."""

    library = "blk"

    def __init__(self) -> None:
        self._parts = np.zeros(1, PARTS)
        self._disk = np.zeros(1, DISK)
        self._serial = np.zeros(BLK_ID_BYTES, np.uint8)
        self._mapping: Mapping | None = None
        self._vector = np.zeros(VECTOR_BYTES, np.uint8)
        # Pages of their own, as direct I/O wants them.
        self._bounce = mmap.mmap(-1, BOUNCE_BYTES)
        # Which has pages as far as it was needed, and most front-ends' memory needs none.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)  # not in every Python
        self._bounce_rooms = mmap.mmap(-1, request.REQUESTS_MAX * BOUNCE_ROOM_BYTES, flags)
        self._zeros = mmap.mmap(-1, BOUNCE_BYTES)
        self._segments = np.zeros((request.SEGMENT_ROWS, 2), np.uint64)
        self._copied = np.zeros((QUEUE_SIZE_MAX, 2), np.uint64)
        self._requests = np.zeros(request.REQUESTS_MAX, request.REQUEST)
        self._chains = np.zeros(CHAINS_MAX, CHAIN)
        self._board = np.zeros(1, request.BOARD)
        self._tokens = np.zeros(request.REQUESTS_MAX, np.uint64)
        self._results = np.zeros(request.REQUESTS_MAX, np.int64)
        self._uring: IoUring | None = None
        self._no_uring = np.zeros(1, URING)
        self._no_uring["fd"] = -1
        self._buffers: Table = np.zeros((0, 2), np.uint64)
        self._helper_disks: list[npt.NDArray[np.void]] = []
        self._helper_bounces: list[mmap.mmap] = []

    def open(
        self,
        fields: commands.Fields,
        fds: list[int],
        kernels: KernelLibrary,
        loop: npt.NDArray[np.void],
        num_vrings: int,
    ) -> list[int]:
        """Take over the image's fd; map it, set io_uring up, start helpers, as `fields` want it."""
        self._kernels = kernels
        disk = self._disk[0]
        size_bytes = int(fields["size_bytes"])
        disk["fd"] = os.dup(fds[0])
        disk["capacity_sectors"] = size_bytes // SECTOR_BYTES
        serial = str(fields["serial"]).encode()[:BLK_ID_BYTES]
        self._serial[: len(serial)] = list(serial)
        disk["id_address"] = self._serial.ctypes.data
        disk["vector_address"] = self._vector.ctypes.data
        disk["bounce_address"] = _address(self._bounce)
        disk["bounce_rooms"] = _address(self._bounce_rooms)
        disk["zeros_address"] = _address(self._zeros)
        disk["zeros_bytes"] = BOUNCE_BYTES
        for name in _FROM_COORDINATOR:
            disk[name] = int(fields[name])
        for name in ("bus_errors", "memory_errors", "disk_errors", "disk_errno"):
            disk[name] = int(loop["record"][0]) + layout.offset_of(layout.WORKER, name)
        self._maps, self._writable_map = bool(fields["maps"]), bool(fields["writable_map"])
        self._map(size_bytes)
        self._loop = loop
        self._running = np.zeros(num_vrings, np.int64)
        request.lay_out(self._board, self._requests)
        self._board["stages"] = loop["stages"][0]
        if fields["uring"]:
            with _on_other_cpus() if fields["sqpoll"] else contextlib.nullcontext():
                ways = {name: bool(fields[name]) for name in ("sqpoll", "iopoll")}
                self._uring = IoUring.open(request.REQUESTS_MAX, **ways)
            self._uring.register_file(self._unlocked_fd())
        self._registers = bool(fields["registers"])
        self._helpers = Helpers(int(fields["helpers"]))
        self._board["free_helpers"] = len(self._helpers.records)
        self._fill_parts()
        self._start_helpers()
        return [self._event_fd(), self._helpers.done_fd]

    def _unlocked_fd(self) -> int:
        """The image opened once more, without its lock.

        Linux closes a registered file some time after its process ended; a back-end that starts anew would find the
        lock still held.
        """
        fd = int(self._disk["fd"][0])
        flags = fcntl.fcntl(fd, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_DIRECT)
        try:
            return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)
        except OSError:
            return fd  # no /proc, or not allowed to open it by now

    def _event_fd(self) -> int:
        return int(self._uring.record["event_fd"][0]) if self._uring else -1

    def _start_helpers(self) -> None:
        for _ in range(len(self._helpers.records)):
            self._helper_disks.append(self._disk.copy())
            self._helper_bounces.append(mmap.mmap(-1, BOUNCE_BYTES))
            self._helper_disks[-1]["bounce_address"] = _address(self._helper_bounces[-1])
        # Helpers read it when they start, which may be late.
        self._helper_parts = self._parts.copy()
        self._helpers.start(self._help)

    def _help(self, index: int) -> None:
        self._kernels.call("help_with", self._helper_parts.ctypes.data, index, self._helper_disks[index].ctypes.data)

    def _map(self, size_bytes: int) -> None:
        disk = self._disk[0]
        disk["map_address"] = disk["map_bytes"] = disk["granules"] = 0
        bus_error_handler.set_mapped_file(0, 0)
        if self._mapping:
            self._mapping.close()
            self._mapping = None
        if not self._maps:
            return
        try:
            self._mapping = Mapping(int(disk["fd"]), size_bytes, writable=self._writable_map)
        except (OSError, ValueError):
            return  # the system calls do the same, more slowly
        self._granules = np.zeros(-(-size_bytes >> GRANULE_SHIFT), np.uint8)
        disk["map_address"] = self._mapping.address
        bus_error_handler.set_mapped_file(self._mapping.address, size_bytes)
        disk["map_bytes"] = size_bytes
        disk["map_writable"] = self._writable_map
        disk["granules_address"] = self._granules.ctypes.data
        disk["granules"] = len(self._granules)
        disk["granule_mark"] = 1

    def _fill_parts(self) -> None:
        """Where everything is that stays where it is."""
        parts = self._parts
        parts["loop"] = self._loop.ctypes.data
        parts["running"] = self._running.ctypes.data
        parts["disk"] = self._disk.ctypes.data
        parts["segments"] = self._segments.ctypes.data
        parts["copied"] = self._copied.ctypes.data
        parts["board"] = self._board.ctypes.data
        parts["chains"] = self._chains.ctypes.data
        parts["requests"] = self._requests.ctypes.data
        parts["uring"] = (self._uring.record if self._uring else self._no_uring).ctypes.data
        parts["tokens"] = self._tokens.ctypes.data
        parts["results"] = self._results.ctypes.data
        parts["helpers"] = self._helpers.records.ctypes.data
        parts["num_helpers"] = len(self._helpers.records)
        for name in ("scratch", "one", "notice_fd"):
            parts[name] = self._loop[name]

    def _call(
        self,
        entry: str,
        rings: npt.NDArray[np.void],
        pollfds: npt.NDArray[np.void],
        regions: Table,
        memory: Table,
        *words: int,
    ) -> int:
        parts = self._parts
        for name, array in (("rings", rings), ("pollfds", pollfds), ("regions", regions), ("memory", memory)):
            parts[name] = array.ctypes.data
            parts[f"num_{name}"] = len(array)
        parts["buffers"] = self._buffers.ctypes.data
        parts["num_buffers"] = len(self._buffers)
        return self._kernels.call(entry, parts.ctypes.data, *words)

    def use_memory(self, memory: Table) -> None:
        """Register it with io_uring, if that was asked for: else requests pin what they need, each by itself."""
        for disk in (self._disk, *self._helper_disks):
            disk["bounces"] = 0  # that the kernel refused some of the former memory says nothing of this one
        if not self._registers or self._uring is None:
            return
        rows = sorted((int(row[ADDRESS]), int(row[SIZE])) for row in memory)
        self._buffers = np.zeros((0, 2), np.uint64)
        try:
            self._buffers = self._uring.register_buffers(rows)
        except OSError as error:
            log.warning("the front-end's memory is not registered with io_uring: %s", error)

    def serve(
        self,
        rings: npt.NDArray[np.void],
        pollfds: npt.NDArray[np.void],
        regions: Table,
        memory: Table,
    ) -> None:
        """Run kernels.blk_worker.serve on the image."""
        self._call("serve", rings, pollfds, regions, memory)

    def serve_again(
        self,
        rings: npt.NDArray[np.void],
        pollfds: npt.NDArray[np.void],
        regions: Table,
        memory: Table,
        index: int,
    ) -> int:
        """Run kernels.blk_entries.serve_again."""
        return self._call("serve_again", rings, pollfds, regions, memory, index)

    def drain(self, rings: npt.NDArray[np.void], pollfds: npt.NDArray[np.void], memory: Table) -> None:
        """Run kernels.blk_worker.drain."""
        self._call("drain", rings, pollfds, memory, memory)

    def command(self, fields: commands.Fields) -> None:
        """`unmap`: the image shrank, read it by system call, which says so. `resize`: it has `size_bytes` now."""
        if fields["name"] == "unmap":
            self._disk["map_address"] = 0
        elif fields["name"] == "resize":
            for disk in (self._disk, *self._helper_disks):
                disk["capacity_sectors"] = fields["size_bytes"] // SECTOR_BYTES
            self._map(int(fields["size_bytes"]))
        else:
            raise WorkerError(f"no such command of a block device: {fields['name']}")


def _address(memory: mmap.mmap) -> Any:
    return np.frombuffer(memory, np.uint8).ctypes.data


if __name__ == "__main__":
    process.main(sys.argv[1:], BlockKernel())
