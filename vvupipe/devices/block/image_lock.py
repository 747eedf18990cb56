"""A lock on an open image that QEMU and its tools understand, and theirs understood here.

QEMU (block/file-posix.c, raw_apply_lock_bytes and raw_check_lock_bytes) has one byte for every permission that an
opener holds and one for every permission that it denies to others. All take shared locks on their bytes, which never
fail, and then look for locks of others on the opposite bytes.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import random
import struct
import time
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from vvupipe.errors import UserError

log = logging.getLogger(__name__)

_HELD_BASE = 100  # RAW_LOCK_PERM_BASE
_DENIED_BASE = 200  # RAW_LOCK_SHARED_BASE
_FLOCK = struct.Struct("@hhqqi0q")  # struct flock: l_type, l_whence, l_start, l_len, l_pid
_NO_SUCH_LOCKS = {errno.ENOLCK, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS}
_RETRY_S = 0.05


class _Permission(IntEnum):
    """The bits of BLK_PERM_* (include/block/block-common.h)."""

    CONSISTENT_READ = 0
    WRITE = 1
    WRITE_UNCHANGED = 2
    RESIZE = 3


@dataclass(frozen=True, slots=True)
class _Claim:
    held: tuple[_Permission, ...]
    denied: tuple[_Permission, ...]

    def own_bytes(self) -> list[int]:
        return [_HELD_BASE + each for each in self.held] + [_DENIED_BASE + each for each in self.denied]

    def opposite_bytes(self) -> list[int]:
        return [_HELD_BASE + each for each in self.denied] + [_DENIED_BASE + each for each in self.held]


_DENIED = (_Permission.WRITE, _Permission.RESIZE)
_READER = _Claim((_Permission.CONSISTENT_READ,), _DENIED)
_WRITER = _Claim((_Permission.CONSISTENT_READ, _Permission.WRITE, _Permission.RESIZE), _DENIED)


def lock(fd: int, path: Path, *, read_only: bool, patience_s: float = 2.0) -> None:
    """Lock the image behind `fd` against writers, and unless `read_only` against readers that want it unchanged.

    The lock belongs to the open file description: it ends when the last copy of `fd` is closed, in whatever process.
    Waits up to `patience_s` seconds for others to let go, as the workers of a killed back-end do. A file system
    without such locks gets a warning in the log.

    Raises: UserError when others keep the image in use, OSError when the system refuses for an unforeseen reason.
    """
    claim = _READER if read_only else _WRITER
    deadline = time.monotonic() + patience_s
    try:
        while (conflict := _try(fd, claim)) is not None:
            if time.monotonic() >= deadline:
                how = "for writing" if conflict < _DENIED_BASE else "for reading, which forbids writing"
                raise UserError(
                    f"{path} is in use by another process ({how}): stop it, or use --no-lock if you know better"
                )
            # Two that wait for each other must not keep step.
            time.sleep(_RETRY_S * random.uniform(0.5, 1.5))
    except OSError as error:
        if error.errno not in _NO_SUCH_LOCKS:
            raise
        log.warning("%s cannot be locked (%s): see to it that nothing else writes to it", path, error.strerror)


def _try(fd: int, claim: _Claim) -> int | None:
    """Take the locks, or none of them when another's is in the way: then that byte."""
    for offset in claim.own_bytes():
        _call(fd, fcntl.F_OFD_SETLK, fcntl.F_RDLCK, offset)
    for offset in claim.opposite_bytes():
        if _call(fd, fcntl.F_OFD_GETLK, fcntl.F_WRLCK, offset) != fcntl.F_UNLCK:
            for own in claim.own_bytes():
                _call(fd, fcntl.F_OFD_SETLK, fcntl.F_UNLCK, own)
            return offset
    return None


def _call(fd: int, command: int, kind: int, offset: int) -> int:
    """One fcntl on one byte. Returns: l_type afterwards."""
    answer: tuple[int, ...] = _FLOCK.unpack(fcntl.fcntl(fd, command, _FLOCK.pack(kind, os.SEEK_SET, offset, 1, 0)))
    return answer[0]
