"""virtio-blk requests (virtio 1.2, 5.2.6): from a segment list to what is to be done, wherever the driver put it."""

import numpy as np
from numba import uint64

from kernels.jit import kernel
from kernels.memory import copy_bytes, load_u32, load_u64
from kernels.status import ERR_BAD_REQUEST, ERR_NO_STATUS, OK
from kernels.virtio_layout import BLK_HEADER_SIZE

_ZERO = np.uint64(0)
_ONE = np.uint64(1)


@kernel
def take_bytes(segments, first, end, scratch, wanted):
    """Copy `wanted` bytes out of segments[first:end] to `scratch`, and cut them off.

    Returns (status, first segment that still has bytes). A driver may spread them at will (5.2.6).
    """
    copied = _ZERO
    while copied < wanted:
        if first >= end:
            return ERR_BAD_REQUEST, first
        address = segments[first, 0]
        length = segments[first, 1]
        if address == _ZERO:
            return ERR_BAD_REQUEST, first
        part = min(length, wanted - copied)
        copy_bytes(scratch + copied, address, part)
        copied += part
        if part == length:
            first += 1
        else:
            segments[first, 0] = address + part
            segments[first, 1] = length - part
    return OK, first


@kernel
def take_status(segments, readable, count):
    """Cut the last writable byte off: it takes the status. Returns (its address or 0, segments that are left)."""
    if count <= readable:
        return _ZERO, count
    last = count - 1
    length = segments[last, 1]
    address = segments[last, 0]
    if address == _ZERO:
        return _ZERO, count
    if length == _ONE:
        return address, count - 1
    segments[last, 1] = length - _ONE
    return address + length - _ONE, count


@kernel
def total_bytes(segments, first, end):
    """Sum of the lengths of segments[first:end]."""
    total = _ZERO
    for k in range(first, end):
        total += segments[k, 1]
    return total


@kernel
def take_header(segments, readable, scratch):
    """Copy the header out and cut it off. Returns (OK or ERR_BAD_REQUEST, first segment with data, type, sector)."""
    first = np.int64(0)
    header = segments[0, 0]
    if readable > 0 and segments[0, 1] == uint64(BLK_HEADER_SIZE) and header != _ZERO:
        first = np.int64(1)  # as most drivers have it: no need to collect it
    else:
        header = scratch
        status, first = take_bytes(segments, np.int64(0), readable, scratch, uint64(BLK_HEADER_SIZE))
        if status != OK:
            return status, np.int64(0), np.int64(-1), _ZERO
    return OK, first, np.int64(load_u32(header)), load_u64(header + uint64(8))


@kernel
def parse_request(segments, readable, count, scratch):
    """Split a chain into header, data and status.

    Returns (status, type, sector, first and end of the readable data, first and end of the writable data, status
    address). With ERR_NO_STATUS the request cannot even be answered.
    """
    status_address, end = take_status(segments, readable, count)
    if status_address == _ZERO:
        return ERR_NO_STATUS, np.int64(-1), _ZERO, 0, 0, 0, 0, _ZERO
    status, first, kind, sector = take_header(segments, readable, scratch)
    return status, kind, sector, first, readable, readable, end, status_address
