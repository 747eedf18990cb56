"""Whether a file's bytes lie in memory for good: tmpfs, or persistent memory without a page cache (DAX)."""

from __future__ import annotations

import ctypes
import struct

_libc = ctypes.CDLL(None, use_errno=True)
_AT_EMPTY_PATH = 0x1000
_STATX_BYTES = 256
_STATX_ATTRIBUTES = struct.Struct("=8xQ")  # struct statx (linux/stat.h): stx_attributes
_STATX_ATTR_DAX = 0x0020_0000
_STATFS_BYTES = 256
_F_TYPE = struct.Struct("@l")  # struct statfs (statfs(2)): f_type comes first
_TMPFS_MAGIC = 0x0102_1994  # linux/magic.h


def is_tmpfs(fd: int) -> bool:
    """Whether the file is in a tmpfs, as memfds and POSIX shared memory are."""
    buffer = ctypes.create_string_buffer(_STATFS_BYTES)
    if _libc.fstatfs(fd, buffer):
        return False
    return bool(_F_TYPE.unpack_from(buffer.raw)[0] == _TMPFS_MAGIC)


def is_dax(fd: int) -> bool:
    """Whether a mapping of the file is the memory that stores it (statx(2), STATX_ATTR_DAX)."""
    buffer = ctypes.create_string_buffer(_STATX_BYTES)
    if not hasattr(_libc, "statx") or _libc.statx(fd, b"", _AT_EMPTY_PATH, 0, buffer):
        return False
    return bool(_STATX_ATTRIBUTES.unpack_from(buffer.raw)[0] & _STATX_ATTR_DAX)
