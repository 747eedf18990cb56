"""Locking bytes of an open file: the lock belongs to that open file, so it goes with its holder, however that ends."""

from __future__ import annotations

import fcntl
import os
import struct

_FLOCK = struct.Struct("@hhqqi4x")  # fcntl(2), struct flock: type, whence, start, length, pid


def try_lock(fd: int, start: int, size_bytes: int) -> bool:
    """Lock these bytes for writing (F_OFD_SETLK); False when another open file, even of ours, has one of them."""
    flock = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, size_bytes, 0)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, flock)
    except (BlockingIOError, PermissionError):
        return False
    return True
