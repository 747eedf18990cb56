"""A MemoryPlacer whose windows are folders that look like /sys/bus/pci/devices."""

import os
import shutil

from vvupipe.vvu import layout
from vvupipe.vvu.region_table import Piece


class WindowPlacer:
    """Each region becomes two windows, one on the bus and one behind a port, when it is long enough to be cut."""

    def __init__(self, devices):
        self.devices = devices
        self._fds = []

    async def place(self, areas):
        self.forget()
        pieces = []
        for number, region in enumerate(areas):
            half = region.size_bytes // 2 & ~4095
            for part, (offset, size) in enumerate([(0, half), (half, region.size_bytes - half)]):
                if size:
                    pieces.append(self._show(2 * number + part, region, region.offset, offset, size))
        return pieces

    def _show(self, number, region, start, offset, size):
        device = 1 + number
        folder = self.devices / f"0000:00:{device:02x}.0"
        place = layout.WINDOW_ON_BUS
        if number % 2:
            folder = folder / "0000:05:00.0"
            place = layout.WINDOW_BEHIND_PORT
        folder.mkdir(parents=True)
        fd = os.dup(region.fd)
        self._fds.append(fd)
        (folder / "enable").write_text("0")
        (folder / "resource2").symlink_to(f"/proc/{os.getpid()}/fd/{fd}")
        return Piece(start + offset, size, region.fd_offset + offset, place, device << 3)

    def forget(self):
        shutil.rmtree(self.devices, ignore_errors=True)
        while self._fds:
            os.close(self._fds.pop())
