"""Fetching into the cache what the next requests of a ring will touch, while the ones before them are done.

The driver wrote descriptors and headers on another CPU: one after the other these misses cost as much as the request
itself, all at once they overlap. What is read here only makes hints; serving reads and checks everything anew.
"""

import numpy as np
from numba import uint64

from kernels.jit import kernel
from kernels.memory import load_u16, load_u64, prefetch, prefetch_write
from kernels.regions import locate
from kernels.virtio_layout import ACCESS_READ, AVAIL_RING, BLK_HEADER_SIZE, DESC_F_INDIRECT, DESC_SIZE

#: Requests looked at together.
AHEAD = 8

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
def indirect_entry(regions, entry):
    """Address of the first descriptor with a buffer: `entry`, or what heads its indirect table; 0: none."""
    if not (load_u64(entry + _EIGHT) >> _FLAGS_SHIFT) & _INDIRECT:
        return entry
    table, available = locate(regions, load_u64(entry), uint64(DESC_SIZE), ACCESS_READ)
    return table if available == DESC_SIZE else _ZERO


@kernel
def header_of(regions, entry):
    """Address of a request's header, which `entry` describes, if it lies in one piece; else 0."""
    header, available = locate(regions, load_u64(entry), uint64(BLK_HEADER_SIZE), ACCESS_READ)
    return header if available == BLK_HEADER_SIZE else _ZERO


@kernel
def look_ahead(ring, regions, places, count):
    """Fetch what serving the next `count` chains (up to AHEAD) will touch. places: uint64[AHEAD, 2], overwritten.

    A driver is likely to have the status byte in the header's line, so that line is fetched to be written.
    """
    for k in range(count):
        places[k, 0] = descriptor_of(ring, k)
        prefetch(places[k, 0])
    for k in range(count):
        if places[k, 0] != _ZERO:
            places[k, 0] = indirect_entry(regions, places[k, 0])
            prefetch(places[k, 0])
    for k in range(count):
        if places[k, 0] != _ZERO:
            prefetch_write(header_of(regions, places[k, 0]))
