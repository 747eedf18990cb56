"""What files and block devices can do, and that asking changes nothing."""

import ctypes
import errno
import os
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests import loop_device
from vvupipe.devices.block import direct_alignment, image_limits
from vvupipe.devices.block.image_limits import ImageLimits, probe

KIB = 1024


def file_system_of(folder):
    command = ["stat", "-f", "-c", "%T", folder]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(params=["disk", "memory"])
def folder(request, tmp_path):
    if request.param == "disk":
        if file_system_of(tmp_path) not in ("ext2/ext3", "xfs", "btrfs", "f2fs"):
            pytest.skip("the folder for temporary files is on no file system of a disk")
        yield tmp_path
    else:
        if not Path("/dev/shm").is_dir() or file_system_of("/dev/shm") != "tmpfs":
            pytest.skip("no tmpfs at /dev/shm")
        with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
            yield Path(name)


def make_image(folder, size_bytes=256 * KIB):
    """With data, holes, as many extents as ext4 has in its inode, and blocks that follow the end."""
    path = folder / "disk.img"
    with path.open("wb") as file:
        for start in range(0, size_bytes, 64 * KIB):
            file.seek(start)
            file.write(b"data" * 4096)
        file.truncate(size_bytes)
        os.fsync(file.fileno())
    return path


def probed(path, *, read_only=False):
    fd = os.open(path, os.O_RDONLY if read_only else os.O_RDWR)
    try:
        return probe(fd, read_only=read_only)
    finally:
        os.close(fd)


def abilities(limits):
    return limits.discard, limits.write_zeroes, limits.write_zeroes_unmap


def facts(path):
    status = path.stat()
    return status.st_size, status.st_blocks, path.read_bytes()


def test_file_that_can_do_it_all(folder):
    path = make_image(folder)
    before = facts(path)
    limits = probed(path)
    assert facts(path) == before
    assert abilities(limits) == (True, True, True)
    assert limits.discard_granularity_bytes == limits.physical_block_bytes == limits.min_io_bytes
    assert limits.physical_block_bytes == 4 * KIB
    assert limits.opt_io_bytes == 0
    assert limits.direct_alignment_bytes in (512, 4 * KIB)


def test_blocks_beyond_the_end_stay(folder):
    path = make_image(folder, 250 * KIB)
    subprocess.run(["fallocate", "-n", "-o", "250KiB", "-l", "1MiB", path], check=True)
    before = facts(path)
    probed(path)
    assert facts(path)[0::2] == before[0::2]
    if file_system_of(folder) == "ext2/ext3":
        assert facts(path)[1] == before[1]


def test_holes_stay_holes(folder):
    path = folder / "hollow.img"
    path.touch()
    os.truncate(path, 1 << 30)
    probed(path)
    assert (path.stat().st_size, path.stat().st_blocks) == (1 << 30, 0)


def test_read_only_image(folder):
    limits = probed(make_image(folder), read_only=True)
    assert abilities(limits) == (False, False, False)
    assert limits.discard_granularity_bytes == 0
    assert limits.physical_block_bytes == 4 * KIB


@pytest.fixture
def fallocate(monkeypatch):
    """A file system that refuses some modes of fallocate, with the calls that were made."""
    calls = []
    real = image_limits._fallocate

    def install(refused, number=errno.EOPNOTSUPP):
        def call(fd, mode, offset, length):
            calls.append(mode)
            if mode & refused:
                ctypes.set_errno(number)
                return -1
            return real(fd, mode, offset, length)

        monkeypatch.setattr(image_limits, "_fallocate", call)
        return calls

    return install


def test_file_system_with_nothing(folder, fallocate):
    path = make_image(folder)
    before = facts(path)
    fallocate(0x12)
    limits = probed(path)
    assert facts(path) == before
    assert abilities(limits) == (False, False, False)


def test_file_system_that_only_zeroes(tmp_path, fallocate):
    if file_system_of(tmp_path) != "ext2/ext3":
        pytest.skip("needs a file system with ZERO_RANGE")
    path = tmp_path / "disk.img"
    path.write_bytes(b"data" * KIB)
    before = facts(path)
    assert fallocate(0x02) == []
    limits = probed(path)
    assert facts(path) == before
    assert abilities(limits) == (False, True, False)


def test_full_file_system_can_still_do_it(tmp_path, fallocate):
    fallocate(0x02, errno.ENOSPC)
    assert probed(make_image(tmp_path)).discard


@pytest.mark.parametrize(("asked", "answer"), [(0, 512), (512, 512), (4096, 4096), (6000, 4096), (1 << 20, 1 << 20)])
def test_physical_blocks_are_powers_of_two(asked, answer):
    assert image_limits._power_of_two(asked) == answer


def test_alignment_by_trying(folder):
    path = make_image(folder)
    fd = os.open(path, os.O_RDONLY)
    try:
        assert direct_alignment._tried(fd) in (512, 4 * KIB)
        told = direct_alignment._told_by_kernel(fd)
        assert told is None or told >= direct_alignment._tried(fd)
    finally:
        os.close(fd)


@pytest.fixture(params=[512, 4096])
def block_device(request, tmp_path):
    path = make_image(tmp_path, 8 * KIB * KIB)
    with loop_device.attached(path, request.param) as device:
        yield device, path, request.param


def test_block_device(block_device):
    device, backing, block_bytes = block_device
    before = facts(backing)
    limits = probed(device)
    assert facts(backing) == before
    assert limits == ImageLimits(
        discard=True,
        write_zeroes=True,
        write_zeroes_unmap=True,
        discard_granularity_bytes=max(4 * KIB, block_bytes),
        logical_block_bytes=block_bytes,
        physical_block_bytes=block_bytes,
        min_io_bytes=block_bytes,
        opt_io_bytes=limits.opt_io_bytes,
        direct_alignment_bytes=block_bytes,
    )


def test_read_only_block_device(block_device):
    device, _, block_bytes = block_device
    limits = probed(device, read_only=True)
    assert abilities(limits) == (False, False, False)
    assert (limits.discard_granularity_bytes, limits.physical_block_bytes) == (0, block_bytes)
