"""When fdatasync is called. /dev/null takes every write and refuses fdatasync (EINVAL), which shows each call."""

import errno
import os

import numpy as np
import pytest

from kernels import blk_io, status
from kernels.blk_disk import DISK
from kernels.control_block import WORKER, offset_of

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def disk():
    """A disk on /dev/null, a segment of 512 bytes, its data, the worker's record."""
    record = np.zeros(1, DISK)
    fd = os.open("/dev/null", os.O_RDWR)
    record["fd"], record["capacity_sectors"] = fd, 8
    worker = np.zeros(1, WORKER)
    for name in ("disk_errors", "disk_errno"):
        record[name] = worker.ctypes.data + offset_of(WORKER, name)
    data = np.zeros(512, np.uint8)
    segments = np.array([[data.ctypes.data, data.size]], np.uint64)
    yield record[0], segments, data, worker
    os.close(fd)


def write(disk, write_through):
    record, segments, *_ = disk
    return blk_io.write_sectors(record, segments, 0, 1, np.uint64(0), write_through)


def test_write_back(disk):
    assert write(disk, 0) == status.OK
    assert blk_io.flush(disk[0]) == status.ERR_IO
    assert (disk[3]["disk_errors"], disk[3]["disk_errno"]) == (1, errno.EINVAL)


def test_write_through(disk):
    assert write(disk, 1) == status.ERR_IO


def test_unsafe(disk):
    disk[0]["unsafe"] = 1
    assert blk_io.flush(disk[0]) == status.OK
    assert write(disk, 1) == status.OK
