"""Driver addresses to process addresses, bounds-checked.

The columns are those of region_table.
"""

import numpy as np

from kernels.jit import inlined, kernel
from kernels.region_table import ACCESS, ADDRESS, GPA, SIZE, UVA
from kernels.virtio_layout import ACCESS_REFUSED

_ZERO = np.uint64(0)


@inlined
def find_row(regions, start):
    """The row that holds driver address `start`; -1: none. The subtraction cannot wrap: it follows the comparison."""
    low = 0
    high = regions.shape[0]
    while high - low > 1:
        middle = (low + high) >> 1
        if regions[middle, GPA] <= start:
            low = middle
        else:
            high = middle
    if high == 0 or start < regions[low, GPA] or start - regions[low, GPA] >= regions[low, SIZE]:
        return -1
    return low


@kernel
def locate(regions, start, length, access):
    """(address here, bytes that follow it in the same region, at most `length`) of driver address `start`.

    (0, 0) when nothing is known of it, or not for `access`; (0, n) when it is known that nothing is there.
    """
    row = find_row(regions, start)
    if row < 0:
        return _ZERO, _ZERO
    offset = start - regions[row, GPA]
    available = min(length, regions[row, SIZE] - offset)
    if regions[row, ACCESS] & np.uint64(ACCESS_REFUSED):
        return _ZERO, available
    if regions[row, ACCESS] & np.uint64(access) != np.uint64(access):
        return _ZERO, _ZERO
    return regions[row, ADDRESS] + offset, available


@inlined
def contiguous(regions, start, length, access):
    """Address here of `length` bytes from driver address `start` on that lie in one region; 0 when they do not."""
    row = find_row(regions, start)
    if row < 0 or length == _ZERO:
        return _ZERO
    offset = start - regions[row, GPA]
    if length > regions[row, SIZE] - offset:
        return _ZERO
    allowed = regions[row, ACCESS]
    if allowed & np.uint64(ACCESS_REFUSED) or allowed & np.uint64(access) != np.uint64(access):
        return _ZERO
    return regions[row, ADDRESS] + offset


@kernel
def contiguous_user(regions, start, length):
    """The same for a front-end user address."""
    for row in range(regions.shape[0]):
        base = regions[row, UVA]
        if start >= base and start - base < regions[row, SIZE]:
            offset = start - base
            return regions[row, ADDRESS] + offset if length <= regions[row, SIZE] - offset else _ZERO
    return _ZERO


@kernel
def physical(regions, address):
    """(found 1 or 0, guest-physical address, bytes that follow in the region) of an address of this process."""
    for row in range(regions.shape[0]):
        base = regions[row, ADDRESS]
        if address >= base and address - base < regions[row, SIZE]:
            offset = address - base
            return 1, regions[row, GPA] + offset, regions[row, SIZE] - offset
    return 0, _ZERO, _ZERO
