"""Chains of the usual shape, several at once: a readable buffer, one of either kind, a writable one.

Each is in one piece, and the first and the last have sizes that are known. Nearly all requests are of that shape. The
driver wrote their descriptors on another CPU: one after the other these cache misses cost as much as a request itself,
looked at together they overlap. A chain of another shape, or one that breaks a rule, ends what is found;
vring.look_at_next reads it and tells what is wrong.
"""

import numpy as np
from numba import int64, uint64

from kernels import packed_ring, split_ring
from kernels.desc_word import (
    FIELD_MASK,
    LEN_MASK,
    PACKED_FLAGS_SHIFT,
    PACKED_ID_SHIFT,
    SPLIT_FLAGS_SHIFT,
    SPLIT_NEXT_SHIFT,
)
from kernels.jit import inlined, kernel
from kernels.memory import load_acquire_u64, load_u16, load_u64, prefetch, prefetch_write
from kernels.regions import contiguous
from kernels.ring_record import CHAINS_MAX
from kernels.virtio_layout import (
    ACCESS_READ,
    ACCESS_WRITE,
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    DESC_SIZE,
)
from kernels.vring import take

_FEW = CHAINS_MAX // 2
#: Descriptors of such a chain.
_DESCRIPTORS = 3
_SPLIT_NEXT = np.uint64(DESC_F_NEXT << 32)
_SPLIT_WRITE = np.uint64(DESC_F_WRITE << 32)
_SPLIT_ALL_BUT_NEXT = np.uint64(0xFFFFFFFFFFFF)  # length and flags
_ZERO = np.uint64(0)
_EIGHT = np.uint64(8)
_DESC = np.uint64(DESC_SIZE)
_TABLE_BYTES = np.uint64(_DESCRIPTORS * DESC_SIZE)


@inlined
def find_split(ring, chains, count):
    """Find the heads of the next `count` chains, which are available. Returns of how many."""
    for k in range(count):
        head = int64(load_u16(split_ring.avail_slot(ring, uint64(ring.last_avail_idx) + uint64(k))))
        if head >= ring.size:
            return k
        chain = chains[k]
        chain.head = head
        chain.table = ring.desc
        chain.index = head
        chain.entries = ring.size
        prefetch(ring.desc + uint64(head) * _DESC)
    return count


@inlined
def find_packed(ring, copied, chains, count):
    """Copy the next chains, at most `count`, out of the ring, as far as they are available. Returns how many."""
    position = ring.last_avail_idx
    first = int64(0)
    for k in range(count):
        word = load_acquire_u64(packed_ring.entry_of(ring, position) + _EIGHT)
        if not packed_ring.is_available(word, position):
            return k
        slots = packed_ring.copy_chain(ring, position, copied, first, min(int64(_DESCRIPTORS), ring.size))
        if slots not in (1, _DESCRIPTORS):
            return k
        chain = chains[k]
        chain.slots = slots
        # The driver writes the id into the last descriptor of a chain (2.8.6).
        chain.buffer_id = int64((copied[first + slots - 1, 1] >> PACKED_ID_SHIFT) & FIELD_MASK)
        chain.copied = first
        first += slots
        position = packed_ring.advance(position, slots, ring.size)
    return count


@inlined
def open_table(ring, regions, chain, address, length):
    """Go on in the indirect table at `address`. False when it is not one of the usual shape."""
    if not ring.indirect or length != _TABLE_BYTES:
        return False
    table = contiguous(regions, address, length, ACCESS_READ)
    if table == _ZERO:
        return False
    chain.table = table
    chain.index = 0
    chain.entries = _DESCRIPTORS
    prefetch(table)
    return True


@inlined
def open_split(ring, regions, chains, count):
    """Find the indirect tables of chains whose heads were found. Returns of how many chains all is found."""
    for k in range(count):
        chain = chains[k]
        entry = chain.table + uint64(chain.index) * _DESC
        word = load_u64(entry + _EIGHT)
        flags = (word >> SPLIT_FLAGS_SHIFT) & FIELD_MASK
        indirect = flags & uint64(DESC_F_INDIRECT) and not flags & uint64(DESC_F_NEXT)
        if indirect and not open_table(ring, regions, chain, load_u64(entry), word & LEN_MASK):
            return k
    return count


@inlined
def open_packed(ring, regions, copied, chains, count):
    """The same for chains that were copied."""
    for k in range(count):
        chain = chains[k]
        if chain.slots != 1:
            continue
        word = copied[chain.copied, 1]
        indirect = (word >> PACKED_FLAGS_SHIFT) & uint64(DESC_F_INDIRECT)
        if not indirect or not open_table(ring, regions, chain, copied[chain.copied, 0], word & LEN_MASK):
            return k
    return count


@inlined
def place(regions, chain, first, first_bytes, data, data_bytes, data_writable, last, last_bytes):
    """Find a chain's three buffers here. False when one of them is not in one piece, or empty."""
    chain.first = contiguous(regions, first, first_bytes, ACCESS_READ)
    # The driver is likely to have what the device writes last in the same line.
    prefetch_write(chain.first)
    if data_writable:
        chain.data = contiguous(regions, data, data_bytes, ACCESS_WRITE)
    else:
        chain.data = contiguous(regions, data, data_bytes, ACCESS_READ)
    chain.data_bytes = data_bytes
    chain.data_writable = data_writable
    chain.last = contiguous(regions, last, last_bytes, ACCESS_WRITE)
    return _ZERO not in (chain.first, chain.data, chain.last)


@inlined
def read_split(regions, chain, first_bytes, last_bytes):
    """Copy the descriptors of a chain (2.7.5) and find its buffers. False when it is not of the usual shape."""
    entry = chain.table + uint64(chain.index) * _DESC
    first = load_u64(entry)
    word = load_u64(entry + _EIGHT)
    index = int64(word >> SPLIT_NEXT_SHIFT)
    if word & _SPLIT_ALL_BUT_NEXT != first_bytes | _SPLIT_NEXT or index >= chain.entries:
        return False
    entry = chain.table + uint64(index) * _DESC
    data = load_u64(entry)
    word = load_u64(entry + _EIGHT)
    data_bytes = word & LEN_MASK
    data_writable = int64(word >> SPLIT_FLAGS_SHIFT) & DESC_F_WRITE
    index = int64(word >> SPLIT_NEXT_SHIFT)
    if word & _SPLIT_ALL_BUT_NEXT & ~_SPLIT_WRITE != data_bytes | _SPLIT_NEXT or index >= chain.entries:
        return False
    entry = chain.table + uint64(index) * _DESC
    last = load_u64(entry)
    if load_u64(entry + _EIGHT) & _SPLIT_ALL_BUT_NEXT != last_bytes | _SPLIT_WRITE:
        return False
    return place(regions, chain, first, first_bytes, data, data_bytes, data_writable, last, last_bytes)


@inlined
def packed_descriptor(copied, chain, number):
    """(address, length, INDIRECT and WRITE flags) of a chain's descriptor, each read once."""
    if chain.slots == 1:
        entry = chain.table + uint64(number) * _DESC
        address = load_u64(entry)
        word = load_u64(entry + _EIGHT)
    else:
        address = copied[chain.copied + number, 0]
        word = copied[chain.copied + number, 1]
    return address, word & LEN_MASK, int64(word >> PACKED_FLAGS_SHIFT) & (DESC_F_INDIRECT | DESC_F_WRITE)


@inlined
def read_packed(regions, copied, chain, first_bytes, last_bytes):
    """Find the buffers of a chain that was copied (2.8.6, 2.8.7). False when it is not of the usual shape."""
    first, first_length, first_flags = packed_descriptor(copied, chain, 0)
    data, data_bytes, data_flags = packed_descriptor(copied, chain, 1)
    last, last_length, last_flags = packed_descriptor(copied, chain, 2)
    if first_length != first_bytes or first_flags or data_flags & DESC_F_INDIRECT:
        return False
    if last_length != last_bytes or last_flags != DESC_F_WRITE:
        return False
    return place(regions, chain, first, first_bytes, data, data_bytes, data_flags, last, last_bytes)


@kernel
def look_at_usual(ring, regions, copied, chains, count, first_bytes, last_bytes):
    """Read the next chains, at most `count`, which stay untaken. Returns how many, until one is of another shape.

    first_bytes, last_bytes: the sizes of the readable and of the writable buffer. chains: ring_record.CHAIN[count].
    copied: uint64[3 * count, 2], of a packed ring. Of a split ring `count` are available. Each descriptor is copied out
    of guest memory once, then checked.
    """
    if ring.packed:
        count = open_packed(ring, regions, copied, chains, find_packed(ring, copied, chains, count))
        for k in range(count):
            if not read_packed(regions, copied, chains[k], first_bytes, last_bytes):
                return k
        return count
    count = open_split(ring, regions, chains, find_split(ring, chains, count))
    for k in range(count):
        if not read_split(regions, chains[k], first_bytes, last_bytes):
            return k
    return count


@inlined
def group_size(ring, available):
    """How many chains to look at together, when so many are available. A packed ring does not tell how many there are.

    Half of them at most: while the driver hears of the first half, the second is done.
    """
    if ring.packed:
        return int64(_FEW)
    return int64(CHAINS_MAX) if available > CHAINS_MAX else min(int64(available), int64(_FEW))


@inlined
def take_usual(ring, chain, copied):
    """Take a chain that was looked at. OK, or ERR_INFLIGHT."""
    if not ring.packed:
        return take(ring, chain.head, copied, int64(0))
    ring.slots = chain.slots
    ring.buffer_id = chain.buffer_id
    status = take(ring, chain.head, copied, chain.copied)
    chain.entry = ring.entry
    return status
