"""What the file behind an image can do besides reading and writing, found out by asking it without changing it."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

_FALLOC_KEEP_SIZE = 1  # fallocate(2)
_FALLOC_PUNCH_HOLE = 2
_FALLOC_ZERO_RANGE = 16
_BLKIOMIN = 0x1278  # <linux/fs.h>
_BLKIOOPT = 0x1279
_BLKPBSZGET = 0x127B
_BLKSSZGET = 0x1268
_PROBE_BYTES = 4096
_SECTOR = 512

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """discard, punch, zero_range: what `kernels.blk_ranges` may use. All sizes in bytes; opt_io: 0, nothing to say."""

    discard: bool
    punch: bool
    zero_range: bool
    discard_granularity: int
    physical_block: int
    min_io: int
    opt_io: int


def probe(fd: int, *, read_only: bool) -> ImageLimits:
    """Ask the file or block device behind `fd`."""
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        return _probe_block_device(fd, read_only=read_only)
    block = max(_SECTOR, os.fstatvfs(fd).f_bsize)
    block = block if block & (block - 1) == 0 else 4096
    punch = not read_only and _fallocate(fd, _FALLOC_PUNCH_HOLE)
    zero_range = not read_only and _fallocate(fd, _FALLOC_ZERO_RANGE)
    if zero_range and punch:
        _fallocate(fd, _FALLOC_PUNCH_HOLE)  # what was reserved beyond the end
    return ImageLimits(punch, punch, zero_range, block, block, block, 0)


def _fallocate(fd: int, mode: int) -> bool:
    """Whether the mode works, tried beyond the end of the file, where it changes nothing that counts."""
    end = -(-os.fstat(fd).st_size // _PROBE_BYTES) * _PROBE_BYTES
    while _libc.fallocate(fd, _FALLOC_KEEP_SIZE | mode, end, _PROBE_BYTES):
        if ctypes.get_errno() != errno.EINTR:
            return False
    return True


def _probe_block_device(fd: int, *, read_only: bool) -> ImageLimits:
    number = os.fstat(fd).st_rdev
    queue = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/queue")
    if not queue.is_dir():
        queue = queue.parent.parent / "queue"  # of the disk that a partition is on
    discard = not read_only and _number(queue / "discard_max_bytes") > 0
    zeroes = not read_only and _number(queue / "write_zeroes_max_bytes") > 0
    physical = _ioctl(fd, _BLKPBSZGET)
    return ImageLimits(
        discard,
        zeroes,
        zeroes,
        max(_number(queue / "discard_granularity"), physical),
        physical,
        _ioctl(fd, _BLKIOMIN),
        _ioctl(fd, _BLKIOOPT),
    )


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0


def _ioctl(fd: int, request: int) -> int:
    answer = fcntl.ioctl(fd, request, bytes(4))
    (value,) = struct.unpack("=I", answer)
    return int(value)


def direct_alignment(fd: int) -> int:
    """The smallest block, 512 or 4096 bytes, that O_DIRECT takes on `fd`, found by reading; 0: none of them."""
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        return _ioctl(fd, _BLKSSZGET)
    with mmap.mmap(-1, _PROBE_BYTES) as buffer:
        for size in (_SECTOR, _PROBE_BYTES):
            view = memoryview(buffer)[:size]
            try:
                os.preadv(fd, [view], 0 if size == _PROBE_BYTES else _SECTOR)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
            else:
                return size
            finally:
                view.release()
    return 0
