"""The dirty-page log of a live migration (docs/interop/vhost-user.rst, "Migration")."""

import numpy as np
from numba import uint8, uint64

from kernels.jit import kernel
from kernels.memory import or_u8, ring_eventfd
from kernels.regions import physical

PAGE_SHIFT = 12  # VHOST_LOG_PAGE

_ZERO = np.uint64(0)
_ONE = np.uint64(1)


@kernel
def mark_physical(ring, gpa, length):
    """Mark the pages of `length` bytes of guest-physical memory as written."""
    if length == _ZERO:
        return
    page = gpa >> uint64(PAGE_SHIFT)
    last = (gpa + length - _ONE) >> uint64(PAGE_SHIFT)
    while page <= last:
        if page >> uint64(3) < ring.log_bytes:
            or_u8(ring.log_address + (page >> uint64(3)), uint8(_ONE << (page & uint64(7))))
        page += _ONE


@kernel
def mark(ring, memory, address, length):
    """Mark what was written at `address` of this process. memory: the front-end's memory table."""
    while length > _ZERO:
        found, gpa, available = physical(memory, address)
        if not found:
            return
        part = min(length, available)
        mark_physical(ring, gpa, part)
        address += part
        length -= part


@kernel
def mark_segments(ring, memory, segments, first, end):
    """Mark segments[first:end]."""
    for k in range(first, end):
        mark(ring, memory, segments[k, 0], segments[k, 1])


@kernel
def mark_used(ring, offset, length):
    """Mark `length` bytes at `offset` of the used ring (split) or the device event area (packed)."""
    if ring.log_used:
        mark_physical(ring, ring.log_gpa + uint64(offset), uint64(length))


@kernel
def tell(ring, one_address):
    """Tell who asked for it (SET_LOG_FD) that the log has news."""
    if ring.log_fd >= 0:
        ring_eventfd(np.int32(ring.log_fd), one_address)
