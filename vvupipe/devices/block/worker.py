"""The block device's part of a worker process: the open image and the kernel that serves it."""

from __future__ import annotations

import os
import sys

import numpy as np
import numpy.typing as npt

from kernels import blk_worker
from kernels import control_block as layout
from kernels.blk_bounce import BOUNCE_BYTES
from kernels.blk_io import DISK
from kernels.virtio_layout import BLK_ID_BYTES, SECTOR_BYTES
from vvupipe.errors import WorkerError
from vvupipe.memory.mapping import Mapping
from vvupipe.workers import commands, process


class BlockKernel:
    """Implements process.DeviceKernel."""

    def __init__(self) -> None:
        self._disk = np.zeros(1, DISK)
        self._serial = np.zeros(BLK_ID_BYTES, np.uint8)
        self._mapping: Mapping | None = None
        self._bounce = np.zeros(BOUNCE_BYTES, np.uint8)

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
        disk["bounce_address"] = self._bounce.ctypes.data
        disk["bus_errors"] = worker_address + layout.offset_of(layout.WORKER, "bus_errors")
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
        regions: npt.NDArray[np.uint64],
        segments: npt.NDArray[np.uint64],
    ) -> None:
        """Run kernels.blk_worker.serve on the image."""
        blk_worker.serve(loop, rings, pollfds, self._disk[0], regions, segments)

    def command(self, fields: commands.Fields) -> None:
        """`{"name": "unmap"}`: the image shrank; read it by system call, which says so."""
        if fields["name"] != "unmap":
            raise WorkerError(f"no such command of a block device: {fields['name']}")
        self._disk["map_address"] = 0


if __name__ == "__main__":
    process.main(sys.argv[1:], BlockKernel())
