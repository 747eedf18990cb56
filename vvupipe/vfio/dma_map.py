"""The client's memory as a vfio-user server reaches it: what DMA_MAP gave, by DMA address."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

from vvupipe.errors import ProtocolError
from vvupipe.memory.mapping import Mapping

_MAPS_MAX = 4096  # far below max_dma_maps of the protocol: a client of ours needs one


@dataclass(slots=True)
class _Entry:
    address: int
    size_bytes: int
    mapping: Mapping


class DmaMap:
    """Implements virtio.split_queue.GuestMemory."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []

    def add(self, address: int, size_bytes: int, fd: int, fd_offset: int) -> None:
        """Map `fd` (which stays the caller's) at a DMA address.

        Raises: OSError with EEXIST over an existing mapping, EINVAL when it cannot be mapped, ENOSPC.
        """
        if not size_bytes or address + size_bytes > 1 << 64:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if any(each.address < address + size_bytes and address < each.address + each.size_bytes for each in self._entries):
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
        if len(self._entries) >= _MAPS_MAX:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        try:
            mapping = Mapping(fd, size_bytes, fd_offset)
        except (ValueError, OverflowError) as error:
            raise OSError(errno.EINVAL, str(error)) from error
        self._entries.append(_Entry(address, size_bytes, mapping))

    def remove(self, address: int, size_bytes: int) -> None:
        """Unmap exactly what was mapped. Raises: OSError with ENOENT."""
        for position, entry in enumerate(self._entries):
            if (entry.address, entry.size_bytes) == (address, size_bytes):
                del self._entries[position]
                entry.mapping.close()
                return
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))

    def clear(self) -> None:
        """Unmap everything."""
        while self._entries:
            self._entries.pop().mapping.close()

    def view(self, address: int, size_bytes: int) -> memoryview:
        """See GuestMemory."""
        for entry in self._entries:
            offset = address - entry.address
            if 0 <= offset and offset + size_bytes <= entry.size_bytes:
                return entry.mapping.view[offset : offset + size_bytes]
        raise ProtocolError(f"{size_bytes} bytes at DMA address {address:#x} are not mapped")

