"""The alignment that direct I/O (O_DIRECT) to a file asks of memory, offsets and lengths."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
import struct

_libc = ctypes.CDLL(None, use_errno=True)
_AT_EMPTY_PATH = 0x1000
_STATX_DIOALIGN = 0x2000
_STATX_BYTES = 256
_STATX_MASK = struct.Struct("=I")  # struct statx (linux/stat.h): stx_mask at 0
_STATX_DIO = struct.Struct("=II")  # stx_dio_mem_align, stx_dio_offset_align at 152
_STATX_DIO_OFFSET = 152
_BLKSSZGET = 0x1268
_TRIED_BYTES = (512, 4096)


def of(fd: int) -> int:
    """Bytes that addresses, offsets and lengths of direct I/O must be multiples of, at least 512; 0: none is possible.

    The kernel says so from Linux 6.1 on (statx(2), STATX_DIOALIGN) for the file systems that know; otherwise block
    devices take their logical blocks, and files are tried. Raises: OSError when the file cannot be asked at all.
    """
    told = _told_by_kernel(fd)
    if told is not None:
        return told
    return logical_block(fd) if stat.S_ISBLK(os.fstat(fd).st_mode) else _tried(fd)


def logical_block(fd: int) -> int:
    """Bytes of a block device's logical block, a power of two. Raises: OSError when it is none."""
    (logical_bytes,) = struct.unpack("=I", fcntl.ioctl(fd, _BLKSSZGET, bytes(4)))
    return int(logical_bytes)


def _told_by_kernel(fd: int) -> int | None:
    if not hasattr(_libc, "statx"):
        return None
    buffer = ctypes.create_string_buffer(_STATX_BYTES)
    if _libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, buffer):
        return None
    (mask,) = _STATX_MASK.unpack_from(buffer.raw)
    if not mask & _STATX_DIOALIGN:
        return None
    memory_bytes, offset_bytes = _STATX_DIO.unpack_from(buffer.raw, _STATX_DIO_OFFSET)
    return max(memory_bytes, offset_bytes, 512) if offset_bytes else 0


def _tried(fd: int) -> int:
    try:
        direct_fd = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return 0
        raise
    try:
        with mmap.mmap(-1, 2 * max(_TRIED_BYTES)) as memory, memoryview(memory) as view:
            for size_bytes in _TRIED_BYTES:
                # Neither more aligned in memory than asked for, nor in length.
                with view[size_bytes : 2 * size_bytes] as piece:
                    try:
                        os.preadv(direct_fd, [piece], 0)
                        return size_bytes
                    except OSError as error:
                        if error.errno != errno.EINVAL:
                            raise
    finally:
        os.close(direct_fd)
    return 0
