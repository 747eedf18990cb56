"""The memory that a vfio-user client lets its function reach."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass

from vvupipe.errors import ProtocolError
from vvupipe.memory.mapping import Mapping

_MAPS_MAX = 65535  # "max_dma_maps"
_ADDRESS_END = 1 << 64


@dataclass(slots=True)
class _DmaMap:
    iova: int
    size_bytes: int
    mapping: Mapping | None  # None: known, but the client gave no fd
    writable: bool


class DmaSpace:
    """Implements virtio's BusMemory on DMA_MAP and DMA_UNMAP."""

    def __init__(self) -> None:
        self._maps: list[_DmaMap] = []

    def map(self, iova: int, size_bytes: int, fd: int | None, fd_offset: int, *, writable: bool) -> None:
        """Add a mapping; `fd` stays the caller's. Raises: OSError (EINVAL, EEXIST on an overlap, ENOSPC)."""
        if not size_bytes or iova + size_bytes > _ADDRESS_END:
            raise OSError(errno.EINVAL, "a DMA mapping that is empty or wraps")
        if len(self._maps) >= _MAPS_MAX:
            raise OSError(errno.ENOSPC, "too many DMA mappings")
        if any(iova < m.iova + m.size_bytes and m.iova < iova + size_bytes for m in self._maps):
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
        self._maps.append(_DmaMap(iova, size_bytes, mapping, writable))

    def unmap(self, iova: int, size_bytes: int) -> None:
        """Remove a mapping, exactly as it was made. Raises: OSError (ENOENT)."""
        for k, entry in enumerate(self._maps):
            if (entry.iova, entry.size_bytes) == (iova, size_bytes):
                del self._maps[k]
                _unmap(entry)
                return
        raise OSError(errno.ENOENT, "no such DMA mapping")

    def clear(self) -> None:
        """Remove all."""
        while self._maps:
            _unmap(self._maps.pop())

    def overlaps(self, iova: int, size_bytes: int) -> bool:
        """Whether any mapping has bytes of this range."""
        return any(iova < m.iova + m.size_bytes and m.iova < iova + size_bytes for m in self._maps)

    def view(self, address_gpa: int, size_bytes: int) -> memoryview:
        """See virtio.split_queue.BusMemory; the bytes must lie in one mapping."""
        for entry in self._maps:
            start = address_gpa - entry.iova
            if start >= 0 and start + size_bytes <= entry.size_bytes:
                if entry.mapping is None or not entry.writable:
                    raise ProtocolError(f"memory at {address_gpa:#x} is not mapped for writing")
                return entry.mapping.view[start : start + size_bytes]
        raise ProtocolError(f"{size_bytes} bytes at {address_gpa:#x} are not mapped for DMA")


def _unmap(entry: _DmaMap) -> None:
    if entry.mapping is not None:
        entry.mapping.close()
