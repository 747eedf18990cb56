"""Walking a descriptor chain of a split virtqueue into a list of segments of this process's memory.

A segment list is uint64[n, 2]: address, length in bytes; it is a `struct iovec` array for readv and its kin at the
same time. An address of 0 marks bytes that are not in guest memory.
"""

import numpy as np
from numba import uint64

from kernels.jit import kernel
from kernels.memory import load_u64
from kernels.regions import GPA, contiguous, locate
from kernels.status import (
    ERR_CHAIN_TOO_LONG,
    ERR_DIRECTION,
    ERR_INDIRECT_TABLE,
    ERR_NEXT_INDEX,
    OK,
)
from kernels.virtio_layout import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, DESC_SIZE

#: Drivers put more segments into an indirect table than a small queue has slots, and QEMU lets them, up to 1024.
INDIRECT_MAX = 1024
#: Room for the longest chain, each descriptor of which may lie across a border between two regions.
SEGMENTS_MAX = 2 * 32768

_LEN_MASK = np.uint64(0xFFFFFFFF)
_FLAGS_SHIFT = np.uint64(32)
_NEXT_SHIFT = np.uint64(48)
_FLAGS_MASK = np.uint64(0xFFFF)
_ZERO = np.uint64(0)
_EIGHT = np.uint64(8)


@kernel
def append_segment(regions, segments, count, gpa, length):
    """Add `length` bytes from `gpa` on, in as many segments as regions hold them. (new count, mapped 1 or 0)."""
    mapped = 1
    while length > _ZERO:
        if count >= segments.shape[0]:
            return np.int64(-1), 0
        address, available = locate(regions, gpa, length, GPA)
        if available == _ZERO:
            segments[count, 0] = _ZERO
            segments[count, 1] = length
            return count + 1, 0
        segments[count, 0] = address
        segments[count, 1] = available
        count += 1
        gpa += available
        length -= available
    return count, mapped


@kernel
def read_chain(ring, regions, head, segments):
    """Walk the chain at `head` (virtio 1.2, 2.7.5). Each descriptor is copied out of guest memory once, then checked.

    Returns (status, readable segments, all segments, 1 when every byte is mapped and no descriptor is empty).
    """
    table = ring.desc
    table_size = ring.size
    limit = ring.size
    index = np.int64(head)
    count = np.int64(0)
    readable = np.int64(-1)
    clean = 1
    seen = 0
    in_indirect = False
    while True:
        seen += 1
        if seen > limit:
            return ERR_CHAIN_TOO_LONG, 0, 0, 0
        entry = table + uint64(index) * uint64(DESC_SIZE)
        gpa = load_u64(entry)
        word = load_u64(entry + _EIGHT)
        length = word & _LEN_MASK
        flags = np.int64((word >> _FLAGS_SHIFT) & _FLAGS_MASK)
        if flags & DESC_F_INDIRECT:
            entries = np.int64(length) // DESC_SIZE
            if in_indirect or not ring.indirect or flags & DESC_F_NEXT or entries == 0:
                return ERR_INDIRECT_TABLE, 0, 0, 0
            if np.int64(length) % DESC_SIZE or entries > max(ring.size, INDIRECT_MAX):
                return ERR_INDIRECT_TABLE, 0, 0, 0
            table = contiguous(regions, gpa, length, GPA)
            if table == _ZERO:
                return ERR_INDIRECT_TABLE, 0, 0, 0
            in_indirect = True
            table_size = entries
            limit = seen + entries
            index = np.int64(0)
            continue
        if flags & DESC_F_WRITE:
            if readable < 0:
                readable = count
        elif readable >= 0:
            return ERR_DIRECTION, 0, 0, 0
        if length == _ZERO:
            clean = 0
        count, mapped = append_segment(regions, segments, count, gpa, length)
        if count < 0:
            return ERR_CHAIN_TOO_LONG, 0, 0, 0
        clean &= mapped
        if not flags & DESC_F_NEXT:
            break
        index = np.int64(word >> _NEXT_SHIFT)
        if index >= table_size:
            return ERR_NEXT_INDEX, 0, 0, 0
    if readable < 0:
        readable = count
    return OK, readable, count, clean
