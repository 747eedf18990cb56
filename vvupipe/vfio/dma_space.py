"""The memory that a vfio-user client lets its function reach."""

from __future__ import annotations

import bisect
import errno
import os
import stat
from dataclasses import dataclass

from vvupipe.errors import ProtocolError
from vvupipe.memory.mapping import Mapping

_MAPS_MAX = 65535  # "max_dma_maps"
ADDRESS_END = 1 << 64


@dataclass(slots=True)
class _DmaMap:
    iova: int
    size_bytes: int
    mapping: Mapping | None  # None: known, but the client gave no fd


class DmaSpace:
    """Implements virtio's BusMemory on DMA_MAP and DMA_UNMAP.

    A client behind an IOMMU maps page by page, so there may be many mappings: they are kept sorted.
    """

    def __init__(self) -> None:
        self._maps: list[_DmaMap] = []
        self._starts: list[int] = []  # their iovas, for bisect

    def map(self, iova: int, size_bytes: int, fd: int | None, fd_offset: int, *, writable: bool) -> None:
        """Add a mapping; `fd` stays the caller's. Raises: OSError (EINVAL, EEXIST on an overlap, ENOSPC)."""
        if not size_bytes or iova + size_bytes > ADDRESS_END:
            raise OSError(errno.EINVAL, "a DMA mapping that is empty or wraps")
        if len(self._maps) >= _MAPS_MAX:
            raise OSError(errno.ENOSPC, "too many DMA mappings")
        if self.overlaps(iova, size_bytes):
            raise OSError(errno.EEXIST, "a DMA mapping over another one")
        mapping = None
        if fd is not None:
            status = os.fstat(fd)
            if stat.S_ISREG(status.st_mode) and status.st_size < fd_offset + size_bytes:
                raise OSError(errno.EINVAL, "a DMA mapping beyond the end of its file")
            try:
                mapping = Mapping(fd, size_bytes, fd_offset, writable=writable)
            except (ValueError, OverflowError) as error:
                raise OSError(errno.EINVAL, str(error)) from error
        place = bisect.bisect(self._starts, iova)
        self._starts.insert(place, iova)
        self._maps.insert(place, _DmaMap(iova, size_bytes, mapping))

    def check_unmap(self, iova: int, size_bytes: int) -> None:
        """Raises: OSError (EINVAL) when `unmap` would."""
        first, end = self._touched(iova, size_bytes)
        if first == end:
            return
        last = self._maps[end - 1]
        if self._starts[first] < iova or last.iova + last.size_bytes > iova + size_bytes:
            raise OSError(errno.EINVAL, "a part of a DMA mapping")

    def unmap(self, iova: int, size_bytes: int) -> None:
        """Remove every mapping in a range, as a type-1 IOMMU does: there need not be one.

        Raises: OSError (EINVAL when the range cuts one in two).
        """
        self.check_unmap(iova, size_bytes)
        first, end = self._touched(iova, size_bytes)
        for entry in self._maps[first:end]:
            _unmap(entry)
        del self._maps[first:end]
        del self._starts[first:end]

    def clear(self) -> None:
        """Remove all."""
        self._starts.clear()
        while self._maps:
            _unmap(self._maps.pop())

    def _touched(self, iova: int, size_bytes: int) -> tuple[int, int]:
        """The mappings [first, end) that have bytes of this range."""
        first = bisect.bisect(self._starts, iova)
        if first and self._maps[first - 1].iova + self._maps[first - 1].size_bytes > iova:
            first -= 1
        return first, max(first, bisect.bisect_left(self._starts, iova + size_bytes))

    def overlaps(self, iova: int, size_bytes: int) -> bool:
        """Whether any mapping has bytes of this range."""
        first, end = self._touched(iova, size_bytes)
        return first < end

    def view(self, address_gpa: int, size_bytes: int) -> memoryview:
        """See virtio.split_queue.BusMemory; the bytes must lie in one mapping, and can be written if that can."""
        place = bisect.bisect(self._starts, address_gpa) - 1
        if place >= 0:
            entry = self._maps[place]
            start = address_gpa - entry.iova
            if start + size_bytes <= entry.size_bytes:
                if entry.mapping is None:
                    raise ProtocolError(f"memory at {address_gpa:#x} came without a file")
                return entry.mapping.view[start : start + size_bytes]
        raise ProtocolError(f"{size_bytes} bytes at {address_gpa:#x} are not mapped for DMA")


def _unmap(entry: _DmaMap) -> None:
    if entry.mapping is not None:
        entry.mapping.close()
