"""Windows onto a sibling's memory in a real VM: other PCI functions whose BAR 2 is that memory (region_table).

They are mapped through sysfs (Linux Documentation/PCI/sysfs-pci.rst, resource0..N), which needs no driver and no IOMMU:
the memory is only looked at by this CPU.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

from vvupipe.errors import TransportError
from vvupipe.pci.address import PciAddress
from vvupipe.vfio.function import MappableArea
from vvupipe.vvu import layout
from vvupipe.vvu.region_table import Piece

log = logging.getLogger(__name__)

_SYSFS = Path("/sys/bus/pci/devices")
_APPEAR_S = 20.0  # a hot-plugged function is there within a second, under emulation on a busy machine in some
_POLL_S = 0.02


class MemoryWindows:
    """The windows of the VM that this process runs in, seen from the function at `address`."""

    def __init__(self, address: PciAddress, devices: Path = _SYSFS) -> None:
        self._address = address
        self._devices = devices

    async def areas(self, pieces: Sequence[Piece]) -> list[MappableArea]:
        """An area for each piece, waiting for windows that were just plugged in.

        Raises: TransportError when one does not appear, or cannot be opened.
        """
        deadline = time.monotonic() + _APPEAR_S
        areas: list[MappableArea] = []
        try:
            for piece in pieces:
                fd = await self._open(piece, deadline)
                areas.append(MappableArea(piece.bar_offset, piece.size_bytes, fd, piece.window_offset))
        except BaseException:
            for area in areas:
                area.close()
            raise
        return areas

    async def _open(self, piece: Piece, deadline: float) -> int:
        while True:
            folder = self._folder(piece)
            if folder is not None:
                size = _size(folder / f"resource{layout.WINDOW_BAR}")
                if size >= piece.window_offset + piece.size_bytes:
                    return self._open_bar(folder)
            if time.monotonic() > deadline:
                place = PciAddress(self._address.domain, self._address.bus, piece.devfn >> 3, piece.devfn & 7)
                behind = "behind the port " if piece.place == layout.WINDOW_BEHIND_PORT else ""
                raise TransportError(f"the window onto the sibling's memory {behind}at {place} does not appear")
            await asyncio.sleep(_POLL_S)

    def _folder(self, piece: Piece) -> Path | None:
        here = PciAddress(self._address.domain, self._address.bus, piece.devfn >> 3, piece.devfn & 7)
        folder = self._devices / str(here)
        if piece.place == layout.WINDOW_ON_BUS:
            return folder if folder.is_dir() else None
        if piece.place != layout.WINDOW_BEHIND_PORT:
            raise TransportError(f"a region table with a place {piece.place}")
        behind = sorted(folder.glob(f"{self._address.domain:04x}:??:00.0"))
        return behind[0] if behind else None

    def _open_bar(self, folder: Path) -> int:
        try:
            enable = folder / "enable"
            # A function without a driver does not answer until somebody enables it.
            if enable.exists() and enable.read_text().strip() == "0":
                enable.write_text("1")
            return os.open(folder / f"resource{layout.WINDOW_BAR}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise TransportError(
                f"cannot open the window {folder.name} onto the sibling's memory: {error.strerror} (it takes root)"
            ) from error


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
