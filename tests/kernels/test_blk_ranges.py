"""Zeros where the file behind an image can do less than was believed. /dev/null takes writes and no fallocate."""

import os

import numpy as np
import pytest

from kernels import blk_ranges, status
from kernels.blk_disk import DISK

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("unmap", [0, 1])
def test_zeros_are_written_when_nothing_better_works(unmap):
    zeros = np.zeros(4096, np.uint8)
    disk = np.zeros(1, DISK)
    fd = os.open("/dev/null", os.O_RDWR)
    try:
        disk["fd"], disk["can_punch"], disk["can_zero_range"] = fd, 1, 1
        disk["zeros_address"], disk["zeros_bytes"] = zeros.ctypes.data, zeros.size
        assert blk_ranges.zero_range(disk[0], np.uint64(0), np.uint64(3 * 4096), unmap) == status.OK
    finally:
        os.close(fd)
