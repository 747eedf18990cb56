"""Guest-physical to process addresses, bounds-checked.

A region table is uint64[n, 4] of this process: gpa, size in bytes, address here, front-end user address.
"""

import numpy as np

from kernels.jit import kernel

GPA = 0
SIZE = 1
ADDRESS = 2
UVA = 3

_ZERO = np.uint64(0)


@kernel
def locate(regions, start, length, column):
    """(address here, bytes that follow it in the same region, at most `length`) of `start`; (0, 0) when unmapped.

    column: GPA or UVA, the address space of `start`. The subtraction cannot wrap: it follows the comparison.
    """
    for k in range(regions.shape[0]):
        base = regions[k, column]
        if start >= base:
            offset = start - base
            if offset < regions[k, SIZE]:
                return regions[k, ADDRESS] + offset, min(length, regions[k, SIZE] - offset)
    return _ZERO, _ZERO


@kernel
def contiguous(regions, start, length, column):
    """Address here of `length` bytes from `start` on that lie in one region; 0 when they do not."""
    address, available = locate(regions, start, length, column)
    if available < length or length == _ZERO:
        return _ZERO
    return address
