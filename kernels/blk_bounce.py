"""File I/O through a buffer of this process, for guest memory that the kernel does not take.

Direct I/O and network file systems pin the pages of the caller's memory; memory of a PCI BAR, which is what a real
device VM sees of its sibling, has none to pin, and the system call ends with EFAULT.
"""

from numba import int64, uint64

from kernels.blk_disk import BOUNCE_BYTES
from kernels.jit import kernel
from kernels.memory import EINTR, copy_bytes, last_errno, libc_pread, libc_pwrite
from kernels.status import ERR_IO, OK

_ZERO = uint64(0)


@kernel
def copy_all(segments, first, end, buffer, gather):
    """Copy all bytes of segments[first:end] to `buffer` (gather), or from there. The rows stay as they are."""
    for k in range(first, end):
        if gather:
            copy_bytes(buffer, segments[k, 0], segments[k, 1])
        else:
            copy_bytes(segments[k, 0], buffer, segments[k, 1])
        buffer += segments[k, 1]


@kernel
def copy_segments(segments, first, end, buffer, count, gather):
    """Copy `count` bytes between the segments and `buffer`, and cut them off. Returns the first segment left."""
    while count > _ZERO and first < end:
        part = min(segments[first, 1], count)
        if gather:
            copy_bytes(buffer, segments[first, 0], part)
        else:
            copy_bytes(segments[first, 0], buffer, part)
        buffer += part
        count -= part
        segments[first, 0] += part
        segments[first, 1] -= part
        if segments[first, 1] == _ZERO:
            first += 1
    return first


@kernel
def whole_transfer(fd, buffer, count, offset, writing):
    """pread or pwrite until all of `count` bytes is done. OK or ERR_IO (error, or end of file)."""
    while count > _ZERO:
        done = libc_pwrite(fd, buffer, count, offset) if writing else libc_pread(fd, buffer, count, offset)
        if done < 0 and last_errno() == EINTR:
            continue
        if done <= 0:
            return ERR_IO
        buffer += uint64(done)
        count -= uint64(done)
        offset += done
    return OK


@kernel
def bounce_transfer(fd, buffer, segments, first, end, offset, writing):
    """What blk_io.transfer does, through `buffer` (BOUNCE_BYTES). OK or ERR_IO."""
    left = _ZERO
    for k in range(first, end):
        left += segments[k, 1]
    while left > _ZERO:
        part = min(left, uint64(BOUNCE_BYTES))
        if writing:
            first = copy_segments(segments, first, end, buffer, part, True)
        if whole_transfer(fd, buffer, part, offset, writing) != OK:
            return ERR_IO
        if not writing:
            first = copy_segments(segments, first, end, buffer, part, False)
        offset += int64(part)
        left -= part
    return OK
