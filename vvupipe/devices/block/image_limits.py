"""What the file behind an image can do, found by asking it, without changing what it holds."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

from vvupipe.devices.block import direct_alignment

_libc = ctypes.CDLL(None, use_errno=True)
# With musl, off_t has 64 bits in either case and only the plain name need exist.
_fallocate = getattr(_libc, "fallocate64", None) or _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

_KEEP_SIZE = 0x01  # FALLOC_FL_* of linux/falloc.h
_PUNCH_HOLE = 0x02
_ZERO_RANGE = 0x10
_BLKIOMIN = 0x1278  # linux/fs.h: _IO(0x12, n)
_BLKIOOPT = 0x1279
_BLKPBSZGET = 0x127B
_SMALLEST_BYTES = 512
_DISKS = Path("/sys/dev/block")


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What can be offered to a driver (virtio 1.2, 5.2.4 and 5.2.6). Sizes are in bytes."""

    discard: bool  #: a file: fallocate(PUNCH_HOLE); a block device: ioctl(BLKDISCARD)
    write_zeroes: bool  #: fallocate(ZERO_RANGE), or PUNCH_HOLE on files where that fails
    write_zeroes_unmap: bool  #: fallocate(PUNCH_HOLE) leaves zeros and gives the space back
    discard_granularity_bytes: int  #: smaller pieces give nothing back; 0: no discard
    logical_block_bytes: int  #: the unit of what is written, a power of two; 512 for files
    physical_block_bytes: int  #: a power of two, at least 512
    min_io_bytes: int  #: smaller requests cost more
    opt_io_bytes: int  #: the best size of long requests; 0: none is better than others
    direct_alignment_bytes: int  #: of O_DIRECT; 0: not possible


def probe(fd: int, *, read_only: bool) -> ImageLimits:
    """Ask the regular file or block device behind `fd`, open for writing unless `read_only`.

    Size, content and allocated blocks stay as they are. Raises: OSError when the file cannot be asked.
    """
    status = os.fstat(fd)
    if stat.S_ISBLK(status.st_mode):
        return _probe_block_device(fd, status.st_rdev, read_only)
    return _probe_file(fd, status, read_only)


def _probe_file(fd: int, status: os.stat_result, read_only: bool) -> ImageLimits:
    block_bytes = _power_of_two(min(status.st_blksize, os.statvfs(fd).f_bsize))
    beyond_end = -(-status.st_size // block_bytes) * block_bytes
    punches = not read_only and _can(fd, _PUNCH_HOLE, beyond_end, block_bytes)
    zeroes = punches or (not read_only and _can_zero(fd, beyond_end, block_bytes, status.st_size))
    return ImageLimits(
        discard=punches,
        write_zeroes=zeroes,
        write_zeroes_unmap=punches,
        discard_granularity_bytes=block_bytes if punches else 0,
        logical_block_bytes=_SMALLEST_BYTES,
        physical_block_bytes=block_bytes,
        min_io_bytes=block_bytes,
        opt_io_bytes=status.st_blksize if status.st_blksize > block_bytes else 0,
        direct_alignment_bytes=direct_alignment.of(fd),
    )


def _can_zero(fd: int, offset: int, length: int, size_bytes: int) -> bool:
    """Whether ZERO_RANGE works on a file in which no holes can be punched."""
    if not _can(fd, _ZERO_RANGE, offset, length):
        return False
    # The only way left to give back what was just allocated beyond the end.
    os.ftruncate(fd, size_bytes)
    return True


def _can(fd: int, mode: int, offset: int, length: int) -> bool:
    while _fallocate(fd, mode | _KEEP_SIZE, offset, length):
        number = ctypes.get_errno()
        if number != errno.EINTR:
            return number in (errno.ENOSPC, errno.EDQUOT)
    return True


def _probe_block_device(fd: int, device: int, read_only: bool) -> ImageLimits:
    queue = queue_folder(device)
    discard = not read_only and _number(queue / "discard_max_bytes") > 0
    write_zeroes = not read_only and _number(queue / "write_zeroes_max_bytes") > 0
    physical_bytes = _power_of_two(_ask(fd, _BLKPBSZGET))
    granularity_bytes = max(_number(queue / "discard_granularity"), physical_bytes)
    return ImageLimits(
        discard=discard,
        write_zeroes=write_zeroes,
        write_zeroes_unmap=discard and write_zeroes,
        discard_granularity_bytes=granularity_bytes if discard else 0,
        logical_block_bytes=direct_alignment.logical_block(fd),
        physical_block_bytes=physical_bytes,
        min_io_bytes=max(_ask(fd, _BLKIOMIN), physical_bytes),
        opt_io_bytes=_ask(fd, _BLKIOOPT),
        direct_alignment_bytes=direct_alignment.of(fd),
    )


def queue_folder(device: int) -> Path:
    """The folder `queue` of a disk, which partitions share."""
    folder = (_DISKS / f"{os.major(device)}:{os.minor(device)}").resolve()
    return (folder.parent if (folder / "partition").exists() else folder) / "queue"


def _number(path: Path) -> int:
    """The number in a file of sysfs; 0 where an older kernel, or a container, has none."""
    try:
        return int(path.read_text())
    except (FileNotFoundError, PermissionError):
        return 0


def _ask(fd: int, request: int) -> int:
    (answer,) = struct.unpack("=I", fcntl.ioctl(fd, request, bytes(4)))
    return int(answer)


def _power_of_two(size_bytes: int) -> int:
    """The largest power of two that is no larger, at least 512."""
    return 1 << max(size_bytes, _SMALLEST_BYTES).bit_length() - 1
