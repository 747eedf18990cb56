"""Walking a descriptor chain of a split virtqueue into a list of segments of this process's memory.

A segment list is uint64[n, 2]: address, length in bytes; it is a `struct iovec` array for readv and its kin at the
same time. An address of 0 marks bytes that are not in guest memory.
"""

import numpy as np
from numba import uint32, uint64

from kernels import control_block as cb
from kernels.desc_word import FIELD_MASK, LEN_MASK, SPLIT_FLAGS_SHIFT, SPLIT_NEXT_SHIFT
from kernels.jit import kernel
from kernels.memory import load_u64, store_u32, store_u64
from kernels.regions import contiguous, locate
from kernels.request_record import SEGMENTS_MAX
from kernels.status import (
    ERR_CHAIN_TOO_LONG,
    ERR_DIRECTION,
    ERR_INDIRECT_TABLE,
    ERR_NEXT_INDEX,
    MISS,
    OK,
)
from kernels.virtio_layout import ACCESS_READ, ACCESS_WRITE, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, DESC_SIZE

#: Drivers put more segments into an indirect table than a small queue has slots, and QEMU lets them, up to 1024.
INDIRECT_MAX = 1024
_MISS_IOVA = np.uint64(cb.offset_of(cb.VRING, "miss_iova"))
_MISS_ACCESS = np.uint64(cb.offset_of(cb.VRING, "miss_access"))
_ZERO = np.uint64(0)
_EIGHT = np.uint64(8)


@kernel
def note_miss(ring, iova, access):
    """Leave word of a translation that is lacking."""
    store_u64(ring.record + _MISS_IOVA, iova)
    store_u32(ring.record + _MISS_ACCESS, uint32(access))


@kernel
def append_segment(ring, regions, segments, count, address, length, access):
    """Add `length` bytes from driver address `address` on, in as many segments as regions hold them.

    Returns (OK, MISS or ERR_CHAIN_TOO_LONG; new count; 1 when all of it is mapped).
    """
    while length > _ZERO:
        if count >= SEGMENTS_MAX:
            return ERR_CHAIN_TOO_LONG, count, 0
        here, available = locate(regions, address, length, access)
        if here == _ZERO:
            if available == _ZERO and ring.iotlb:
                note_miss(ring, address, access)
                return MISS, count, 0
            segments[count, 0] = _ZERO
            segments[count, 1] = length
            return OK, count + 1, 0
        segments[count, 0] = here
        segments[count, 1] = available
        count += 1
        address += available
        length -= available
    return OK, count, 1


@kernel
def add_buffer(ring, regions, segments, count, readable, address, length, writable):
    """Add one descriptor's buffer. readable: segments before the first writable one, -1 while there is none.

    Returns (OK, MISS or ERR_*; count; readable; 1 when it is mapped and not empty).
    """
    if writable:
        if readable < 0:
            readable = count
    elif readable >= 0:
        return ERR_DIRECTION, count, readable, 0
    access = ACCESS_WRITE if writable else ACCESS_READ
    status, count, mapped = append_segment(ring, regions, segments, count, address, length, access)
    return status, count, readable, mapped if length > _ZERO else 0


@kernel
def indirect_table(ring, regions, address, length):
    """(OK, MISS or ERR_INDIRECT_TABLE; where the table is here; its entries) (virtio 1.2, 2.7.5.3 and 2.8.7)."""
    entries = np.int64(length) // DESC_SIZE
    if not ring.indirect or entries == 0 or np.int64(length) % DESC_SIZE or entries > max(ring.size, INDIRECT_MAX):
        return ERR_INDIRECT_TABLE, _ZERO, np.int64(0)
    table = contiguous(regions, address, length, ACCESS_READ)
    if table == _ZERO:
        if ring.iotlb:
            here, available = locate(regions, address, length, ACCESS_READ)
            missing = address + available
            if here != _ZERO or available == _ZERO:
                row_here, row_available = locate(regions, missing, uint64(1), ACCESS_READ)
                if row_here == _ZERO and row_available == _ZERO:
                    note_miss(ring, missing, ACCESS_READ)
                    return MISS, _ZERO, np.int64(0)
        return ERR_INDIRECT_TABLE, _ZERO, np.int64(0)
    return OK, table, entries


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
            return ERR_CHAIN_TOO_LONG, np.int64(0), np.int64(0), 0
        entry = table + uint64(index) * uint64(DESC_SIZE)
        address = load_u64(entry)
        word = load_u64(entry + _EIGHT)
        length = word & LEN_MASK
        flags = np.int64((word >> SPLIT_FLAGS_SHIFT) & FIELD_MASK)
        if flags & DESC_F_INDIRECT:
            if in_indirect or flags & DESC_F_NEXT:
                return ERR_INDIRECT_TABLE, np.int64(0), np.int64(0), 0
            status, table, table_size = indirect_table(ring, regions, address, length)
            if status != OK:
                return status, np.int64(0), np.int64(0), 0
            in_indirect = True
            limit = seen + table_size
            index = np.int64(0)
            continue
        status, count, readable, good = add_buffer(
            ring, regions, segments, count, readable, address, length, flags & DESC_F_WRITE
        )
        if status != OK:
            return status, np.int64(0), np.int64(0), 0
        clean &= good
        if not flags & DESC_F_NEXT:
            break
        index = np.int64(word >> SPLIT_NEXT_SHIFT)
        if index >= table_size:
            return ERR_NEXT_INDEX, np.int64(0), np.int64(0), 0
    if readable < 0:
        readable = count
    return OK, readable, count, clean
