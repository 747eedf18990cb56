"""The block device's part of a worker process: the open image and the kernel that serves it."""

from __future__ import annotations

import mmap
import os
import sys

import numpy as np
import numpy.typing as npt

from kernels import blk_worker
from kernels import control_block as layout
from kernels.blk_bounce import BOUNCE_BYTES
from kernels.blk_disk import DISK
from kernels.virtio_layout import BLK_ID_BYTES, SECTOR_BYTES
from vvupipe.errors import WorkerError
from vvupipe.memory.mapping import Mapping
from vvupipe.workers import commands, process
from vvupipe.workers.worker_memory import Table

#: fields of DISK that say what the image can do
_ABILITIES = ("can_discard", "can_write_zeroes", "can_punch", "can_zero_range")


class BlockKernel:
    """Implements process.DeviceKernel."""

    def __init__(self) -> None:
        self._disk = np.zeros(1, DISK)
        self._serial = np.zeros(BLK_ID_BYTES, np.uint8)
        self._mapping: Mapping | None = None
        # Pages of their own, as direct I/O wants them.
        self._bounce = mmap.mmap(-1, BOUNCE_BYTES)
        self._zeros = mmap.mmap(-1, BOUNCE_BYTES)

    def open(self, fields: commands.Fields, fds: list[int], worker_address: int) -> None:
        """Take over the image's fd; map it when it can be mapped, for reads only."""
        disk = self._disk[0]
        size_bytes = int(fields["size_bytes"])
        disk["fd"] = os.dup(fds[0])
        disk["capacity_sectors"] = size_bytes // SECTOR_BYTES
        disk["read_only"] = int(fields["read_only"])
        serial = str(fields["serial"]).encode()[:BLK_ID_BYTES]
        self._serial[: len(serial)] = list(serial)
        disk["id_address"] = self._serial.ctypes.data
        disk["bounce_address"] = np.frombuffer(self._bounce, np.uint8).ctypes.data
        disk["zeros_address"] = np.frombuffer(self._zeros, np.uint8).ctypes.data
        disk["zeros_bytes"] = BOUNCE_BYTES
        for name in ("direct", "unsafe", "is_block", *_ABILITIES):
            disk[name] = int(fields[name])
        disk["bus_errors"] = worker_address + layout.offset_of(layout.WORKER, "bus_errors")
        self._map(size_bytes)

    def _map(self, size_bytes: int) -> None:
        disk = self._disk[0]
        disk["map_address"] = disk["map_start"] = disk["map_bytes"] = 0
        if self._mapping:
            self._mapping.close()
            self._mapping = None
        if disk["direct"]:
            return
        try:
            self._mapping = Mapping(int(disk["fd"]), size_bytes, writable=False)
        except (OSError, ValueError):
            return  # not every file can be mapped; the system calls do the same, more slowly
        disk["map_address"] = disk["map_start"] = self._mapping.address
        disk["map_bytes"] = size_bytes

    def serve(
        self,
        loop: npt.NDArray[np.void],
        rings: npt.NDArray[np.void],
        pollfds: npt.NDArray[np.void],
        regions: Table,
        memory: Table,
        segments: Table,
        copied: Table,
    ) -> None:
        """Run kernels.blk_worker.serve on the image."""
        blk_worker.serve(loop, rings, pollfds, self._disk[0], regions, memory, segments, copied)

    def command(self, fields: commands.Fields) -> None:
        """`unmap`: the image shrank, read it by system call, which says so. `resize`: it has `size_bytes` now."""
        if fields["name"] == "unmap":
            self._disk["map_address"] = 0
        elif fields["name"] == "resize":
            self._disk["capacity_sectors"] = fields["size_bytes"] // SECTOR_BYTES
            self._map(int(fields["size_bytes"]))
        else:
            raise WorkerError(f"no such command of a block device: {fields['name']}")


if __name__ == "__main__":
    process.main(sys.argv[1:], BlockKernel())
