"""Fetching into the cache what the next requests of a ring will touch, while the ones before them are done.

The driver wrote descriptors, headers and buffers on another CPU and the image is far larger than any cache: one after
the other these misses cost more than the request itself, all at once they overlap. What is read here only makes
hints; serving reads and checks everything anew.
"""

import numpy as np
from numba import uint64

from kernels.jit import kernel
from kernels.memory import load_u16, load_u64, prefetch
from kernels.regions import locate
from kernels.virtio_layout import ACCESS_READ, AVAIL_RING, BLK_HEADER_SIZE, DESC_F_INDIRECT, DESC_SIZE, SECTOR_SHIFT

#: Requests looked at together.
AHEAD = 8
#: Lines of the image fetched for each; the CPU's own prefetcher goes on from there.
_LINES = 4
_LINE_BYTES = 64

_ZERO = np.uint64(0)
_EIGHT = np.uint64(8)
_FLAGS_SHIFT = np.uint64(32)
_INDIRECT = np.uint64(DESC_F_INDIRECT)


@kernel
def descriptor_of(ring, ahead):
    """Address of the head descriptor of the chain `ahead` places behind the next; 0 when the driver's index is bad."""
    slot = (uint64(ring.last_avail_idx) + uint64(ahead)) & uint64(ring.size - 1)
    head = uint64(load_u16(ring.avail + uint64(AVAIL_RING) + uint64(2) * slot))
    if head >= uint64(ring.size):
        return _ZERO
    return ring.desc + head * uint64(DESC_SIZE)


@kernel
def first_descriptor(ring, regions, ahead):
    """Address of the first descriptor with a buffer: the head, or the first one of its indirect table; 0: none."""
    entry = descriptor_of(ring, ahead)
    if entry == _ZERO or not (load_u64(entry + _EIGHT) >> _FLAGS_SHIFT) & _INDIRECT:
        return entry
    table, available = locate(regions, load_u64(entry), uint64(DESC_SIZE), ACCESS_READ)
    return table if available == DESC_SIZE else _ZERO


@kernel
def header_of(ring, regions, ahead):
    """Address of the request's header if it lies in one piece, else 0."""
    entry = first_descriptor(ring, regions, ahead)
    if entry == _ZERO:
        return _ZERO
    header, available = locate(regions, load_u64(entry), uint64(BLK_HEADER_SIZE), ACCESS_READ)
    return header if available == BLK_HEADER_SIZE else _ZERO


@kernel
def look_ahead(ring, disk, regions, count):
    """Fetch what serving the next `count` chains will touch."""
    for k in range(count):
        prefetch(descriptor_of(ring, k))
    for k in range(count):
        prefetch(first_descriptor(ring, regions, k))
    for k in range(count):
        prefetch(header_of(ring, regions, k))
    if disk.map_address == _ZERO:
        return
    for k in range(count):
        header = header_of(ring, regions, k)
        if header == _ZERO:
            continue
        offset = load_u64(header + _EIGHT) << uint64(SECTOR_SHIFT)
        if offset < disk.map_bytes:
            for line in range(_LINES):
                prefetch(disk.map_address + offset + uint64(line * _LINE_BYTES))
