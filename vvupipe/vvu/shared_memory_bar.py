"""BAR 4: the sibling's memory regions one after another, in the order of its memory table."""

from __future__ import annotations

import logging
import os

from vvupipe.errors import ProtocolError
from vvupipe.memory.mapping import Mapping
from vvupipe.memory.region import MemoryRegion
from vvupipe.vfio.function import MappableArea

log = logging.getLogger(__name__)


class SharedMemoryBar:
    """Owns the fds of the regions in it."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.areas: list[MappableArea] = []

    def check(self, regions: list[MemoryRegion]) -> None:
        """Raises: ProtocolError when `regions` do not fit."""
        total = sum(region.size_bytes for region in regions)
        if total > self.size_bytes:
            raise ProtocolError(f"{total >> 20} MiB of memory do not fit into a BAR of {self.size_bytes >> 20} MiB")

    def fill(self, regions: list[MemoryRegion]) -> None:
        """Take over `regions` and let go of the former ones.

        Raises: ProtocolError when they do not fit; then the fds stay the caller's.
        """
        self.check(regions)
        self.clear()
        offset = 0
        for region in regions:
            self.areas.append(MappableArea(offset, region.size_bytes, region.fd, region.fd_offset))
            region.fd = -1
            offset += region.size_bytes

    def clear(self) -> None:
        """Let go of everything."""
        while self.areas:
            self.areas.pop().close()

    def read(self, offset: int, count: int) -> bytes:
        """For clients that cannot map: zeros where there is no memory."""
        data = bytearray(count)
        for area, area_offset, data_offset, size in self._pieces(offset, count):
            # A read that the sibling's truncated file cuts short leaves zeros; through a mapping it would kill us.
            piece = os.pread(area.fd, size, area.fd_offset + area_offset)
            data[data_offset : data_offset + len(piece)] = piece
        return bytes(data)

    def write(self, offset: int, data: bytes) -> None:
        """For clients that cannot map: what goes where there is no memory is dropped."""
        for area, area_offset, data_offset, size in self._pieces(offset, len(data)):
            piece = data[data_offset : data_offset + size]
            start = area.fd_offset + area_offset
            if start + size > os.fstat(area.fd).st_size:
                log.warning("a write beyond the end of the sibling's memory file was dropped")
                continue
            try:
                os.pwrite(area.fd, piece, start)
            except OSError:
                # hugetlbfs cannot be written by system call
                with Mapping(area.fd, size, start) as mapping:
                    mapping.view[:] = piece

    def _pieces(self, offset: int, count: int) -> list[tuple[MappableArea, int, int, int]]:
        """(area, offset in it, offset in the data, size) of each part of the access that is memory."""
        pieces = []
        for area in self.areas:
            start = max(offset, area.offset)
            end = min(offset + count, area.offset + area.size_bytes)
            if start < end:
                pieces.append((area, start - area.offset, start - offset, end - start))
        return pieces
