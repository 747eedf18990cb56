"""Memory of this process that a function may use by DMA: shared, so that it can be mapped twice, and locked."""

from __future__ import annotations

import ctypes
import os

from vvupipe.errors import UserError
from vvupipe.memory import shared
from vvupipe.memory.mapping import Mapping

_libc = ctypes.CDLL(None, use_errno=True)


class LockedMemory:
    """`size_bytes` (whole pages) at `gpa` of the device's address space: implements vvu.driver.DmaBuffer."""

    def __init__(self, size_bytes: int, gpa: int) -> None:
        """Raises: UserError when so much memory may not be locked."""
        self.size_bytes = size_bytes
        self.gpa = gpa
        self.fd = shared.create_unnamed(size_bytes)
        self.fd_offset = 0
        self._mapping = Mapping(self.fd, size_bytes)
        self.view = self._mapping.view
        if _libc.mlock(ctypes.c_void_p(self._mapping.address), ctypes.c_size_t(size_bytes)):
            number = ctypes.get_errno()
            self.close()
            raise UserError(f"{size_bytes >> 10} KiB may not be locked ({os.strerror(number)}): raise ulimit -l")

    def close(self) -> None:
        """Give it up; harmless when called again."""
        if self.fd >= 0:
            self._mapping.close()
            os.close(self.fd)
            self.fd = -1
