"""Locks on an image, compatible with QEMU's: each refuses what the other has open for writing.

QEMU (block/file-posix.c) takes OFD locks on single bytes: 100 + i for each permission that it has, 200 + i for each
that it does not let others have, and looks for those of others.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
import time
from pathlib import Path

from vvupipe.errors import UserError

log = logging.getLogger(__name__)

_CONSISTENT_READ, _WRITE, _WRITE_UNCHANGED, _RESIZE = range(4)
_HELD = 100
_UNSHARED = 200
_FLOCK = struct.Struct("=hhqqi4x")  # struct flock of 64-bit Linux: type, whence, start, len, pid
_F_OFD_GETLK = 36  # <fcntl.h>
_F_OFD_SETLK = 37
_NO_LOCKS_THERE = {errno.ENOLCK, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS}
_RETRY_S = 0.05


def lock(fd: int, path: Path, *, read_only: bool, patience_s: float = 3.0) -> None:
    """Lock the image behind `fd`; the lock lasts as long as the open file.

    patience_s: a back-end that was killed lives on in its workers for a moment. Raises: UserError when another process
    has it.
    """
    held = {_CONSISTENT_READ} if read_only else {_CONSISTENT_READ, _WRITE, _RESIZE}
    unshared = {_WRITE, _RESIZE}
    deadline = time.monotonic() + patience_s
    try:
        for byte in [_HELD + each for each in held] + [_UNSHARED + each for each in unshared]:
            _take(fd, byte)
        while _others_hold(fd, held, unshared):
            if time.monotonic() > deadline:
                use = "for writing" if read_only else "by another process"
                raise UserError(f"{path} is in use {use}: stop that first, or say --no-lock if you know better")
            time.sleep(_RETRY_S)
    except OSError as error:
        if error.errno not in _NO_LOCKS_THERE:
            raise
        log.warning("%s cannot be locked where it is: %s", path, error.strerror)


def _take(fd: int, byte: int) -> None:
    fcntl.fcntl(fd, _F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))


def _others_hold(fd: int, held: set[int], unshared: set[int]) -> bool:
    """Whether somebody does not share what we have, or has what we do not share."""
    bytes_of_others = [_UNSHARED + each for each in held] + [_HELD + each for each in unshared]
    return any(_is_taken(fd, byte) for byte in bytes_of_others)


def _is_taken(fd: int, byte: int) -> bool:
    answer = fcntl.fcntl(fd, _F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    return int(_FLOCK.unpack(answer)[0]) != fcntl.F_UNLCK
