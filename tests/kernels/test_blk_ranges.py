"""Zeros where the file behind an image can do less than was believed. /dev/null takes writes and no fallocate."""

import os

import numpy as np
import pytest

from kernels import blk_ranges, status
from kernels.blk_disk import DISK
from tests import loop_device

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


def test_ranges_of_sectors_on_a_block_device_of_4_kib_blocks(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(b"x" * (1 << 20))
    zeros, scratch = np.zeros(4096, np.uint8), np.zeros(8, np.uint64)
    disk = np.zeros(1, DISK)
    with loop_device.attached(path, 4096) as device:
        fd = os.open(device, os.O_RDWR)
        try:
            disk["fd"], disk["is_block"], disk["logical_bytes"] = fd, 1, 4096
            disk["can_punch"], disk["can_zero_range"] = 1, 1
            disk["zeros_address"], disk["zeros_bytes"] = zeros.ctypes.data, zeros.size
            for offset, length in ((512, 1024), (4096 - 512, 2 * 4096 - 1024), (512, 3 * 4096)):
                done = blk_ranges.discard_range(
                    disk[0], np.uint64(offset), np.uint64(length), np.uint64(scratch.ctypes.data)
                )
                assert done == status.OK
            # Only the last one had whole blocks in it, the second and the third of the disk.
            assert os.pread(fd, 4 * 4096, 0) == b"x" * 4096 + bytes(2 * 4096) + b"x" * 4096
            assert blk_ranges.zero_range(disk[0], np.uint64(8 * 4096 + 512), np.uint64(512), 0) == status.OK
            assert disk["can_zero_range"] == 1, "what is not aligned says nothing about what is"
            assert os.pread(fd, 2048, 8 * 4096) == b"x" * 512 + bytes(512) + b"x" * 1024
        finally:
            os.close(fd)
