"""Writes into a hole of an image whose file system is full: an error for them, and for nothing else."""

import asyncio
import errno
import os
import subprocess
import time

import pytest

from tests.mock.blk_driver import IN, IOERR, OK, OUT, BlkDriver
from tests.mock.driver_ring import DriverRing
from tests.vvupipe.workers.pool_kit import in_scene
from vvupipe.workers.io_uring import available

pytestmark = pytest.mark.timeout(60)

PAGE = 4096
IMAGE_BYTES = 8 << 20
KEPT = os.urandom(64 << 10)
needs_io_uring = pytest.mark.skipif(available() is not None, reason=f"io_uring: {available()}")
ENGINES = ["mmap", pytest.param("uring", marks=needs_io_uring), "sync"]


def mounted(arguments, folder):
    done = subprocess.run(["mount", *arguments, folder], capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")


def unmount(folder):
    """Linux takes a moment to close what was registered with the io_uring of a process that ended."""
    deadline = time.monotonic() + 10
    while subprocess.run(["umount", folder], capture_output=True, timeout=20, check=False).returncode:
        assert time.monotonic() < deadline, "somebody still has the image open"
        time.sleep(0.05)


@pytest.fixture(params=["tmpfs", "ext4"])
def folder(request, tmp_path):
    """A small file system."""
    folder = tmp_path / "small"
    folder.mkdir()
    if request.param == "tmpfs":
        mounted(["-t", "tmpfs", "-o", "size=1m", "none"], folder)
    else:
        with open(tmp_path / "ext4", "wb") as file:
            file.truncate(4 << 20)
        try:
            subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", tmp_path / "ext4"], check=True, timeout=20)
        except OSError as error:
            pytest.skip(f"no mkfs.ext4: {error}")
        mounted(["-o", "loop", tmp_path / "ext4"], folder)
    yield folder
    unmount(folder)


def fill(folder):
    """Leave no block free. The file that has them all."""
    path = folder / "filler"
    fd = os.open(path, os.O_CREAT | os.O_WRONLY)
    for size in (64 << 10, PAGE, 1024):
        try:
            while os.write(fd, bytes(size)) == size:
                pass
        except OSError:
            continue
    os.close(fd)
    return path


@pytest.mark.parametrize("engine", ENGINES)
def test_full_file_system(folder, engine):
    path = folder / "disk.img"
    with open(path, "wb") as file:
        file.write(KEPT)
        file.truncate(IMAGE_BYTES)

    async def story(scene):
        await scene.give_memory()
        disk = BlkDriver(DriverRing(scene.memory))
        await scene.pool.start_vring(scene.setup(0, disk.ring))

        async def request(*arguments, **options):
            return await asyncio.to_thread(disk.request, *arguments, **options)

        hole = 4096
        # Read first, so that the page of a hole is in the page cache where a file system keeps such pages.
        assert (await request(IN, hole, size=PAGE))[:2] == (OK, bytes(PAGE))
        filler = fill(folder)
        for _ in range(2):
            assert (await request(OUT, hole, b"w" * PAGE))[0] == IOERR
            assert (await request(IN, 0, size=len(KEPT)))[:2] == (OK, KEPT)
        assert (await request(IN, hole, size=PAGE))[:2] == (OK, bytes(PAGE))
        assert (await request(OUT, 8, b"k" * PAGE))[0] == OK, "where there are blocks already"
        assert not scene.pool._slots[0].deaths
        worker = scene.pool.block.workers[0]
        assert (worker["disk_errors"], worker["disk_errno"]) == (2, errno.ENOSPC)
        filler.unlink()
        os.sync()
        assert (await request(OUT, hole, b"w" * PAGE))[0] == OK
        assert (await request(IN, hole, size=PAGE))[:2] == (OK, b"w" * PAGE)
        assert not disk.ring.broken(0)

    in_scene(path, story, engine=engine)
    with open(path, "rb") as file:
        content = file.read()
    kept = KEPT[:PAGE] + b"k" * PAGE + KEPT[2 * PAGE :]
    assert content[: len(KEPT)] == kept
    assert content[4096 * 512 : 4096 * 512 + PAGE] == b"w" * PAGE
    assert len(content) == IMAGE_BYTES
    assert content.count(0) >= IMAGE_BYTES - len(KEPT) - PAGE
