"""What is copied from and to the mapped image, and what is left to somebody who may wait for the disk."""

import ctypes
import mmap
import os

import numpy as np
import pytest

from kernels import image_map
from kernels.blk_disk import DISK, GRANULE_SHIFT
from kernels.image_map import COPY_MAX_BYTES, MARK_MAX
from kernels.region_table import ADDRESS
from tests.kernels.batch_disk import batch_disk
from tests.kernels.others import by_hand, shared
from tests.kernels.test_blk_any_order import KINDS
from tests.mock.blk_driver import IN, OK, OUT

pytestmark = pytest.mark.timeout(120)

PAGE = mmap.PAGESIZE
PAGE_SECTORS = PAGE // 512
GRANULE_SECTORS = (1 << GRANULE_SHIFT) // 512


def on_the_spot(world, requests):
    """Which of the requests, that were put, are done when nobody but the worker does anything."""
    world.batch.show()
    world.serve()
    done = world.batch.look()
    return [request in done for request in requests]


def finish_by_hand(world):
    while world.board["under_way"]:
        for index in world.disk.others.given():
            world.disk.others.do(index)
        world.serve()
    world.batch.look()


def resident(disk, offset):
    """Whether a page of the image is in memory, by mincore(2)."""
    answer = ctypes.create_string_buffer(1)
    address = ctypes.c_void_p(int(disk["map_address"]) + offset)
    assert ctypes.CDLL(None).mincore(address, ctypes.c_size_t(PAGE), answer) == 0
    return bool(answer.raw[0] & 1)


def drop_from_cache(world):
    fd = world.disk.fd
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    if any(resident(world.disk.disks[0], offset) for offset in range(0, len(world.content), PAGE)):
        pytest.skip("this file system keeps its pages")


@pytest.fixture
def file(tmp_path):
    return os.open(tmp_path / "image", os.O_RDWR | os.O_CREAT)


def test_what_is_not_in_memory_is_somebody_elses(file):
    with batch_disk(by_hand(4), mapped=True, fd=file) as world:
        drop_from_cache(world)
        first = world.batch.put(IN, 0, size=PAGE)
        write = world.batch.put(OUT, GRANULE_SECTORS * 2, b"w" * PAGE)
        assert on_the_spot(world, [first, write]) == [False, False]
        assert not resident(world.disk.disks[0], 0), "asking did not fetch it"
        finish_by_hand(world)
        assert (first.status, write.status, first.data) == (OK, OK, world.content[:PAGE])
        # What was fetched for the first one is there for the next.
        assert resident(world.disk.disks[0], 0)
        again = world.batch.put(IN, 0, size=PAGE)
        assert on_the_spot(world, [again]) == [True]
        assert again.data == world.content[:PAGE]
        world.check_done()


def test_one_page_that_is_lacking_is_enough(file):
    with batch_disk(by_hand(4), mapped=True, fd=file) as world:
        drop_from_cache(world)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)  # no more than what is asked for
        os.pread(file, 2 * PAGE, 0)
        assert [resident(world.disk.disks[0], page * PAGE) for page in range(3)] == [True, True, False]
        inside = world.batch.put(IN, 1, size=2 * PAGE - 512)
        across = world.batch.put(IN, 1, size=2 * PAGE)
        assert on_the_spot(world, [inside, across]) == [True, False]
        finish_by_hand(world)
        assert across.data == world.content[512 : 512 + 2 * PAGE]
        world.check_done()


@KINDS
def test_reading_a_hole_of_tmpfs_allocates_nothing(kind):
    with batch_disk(shared(kind), mapped=True) as world:
        fd, size = world.disk.fd, len(world.content)
        os.ftruncate(fd, 0)
        os.ftruncate(fd, size)
        assert os.fstat(fd).st_blocks == 0
        holes = [world.batch.put(IN, sector, size=PAGE) for sector in range(0, size // 512, GRANULE_SECTORS)]
        world.batch.show()
        world.serve_all()
        assert {request.data for request in holes} == {bytes(PAGE)}
        assert os.fstat(fd).st_blocks == 0
        world.batch.put(OUT, PAGE_SECTORS, b"w" * PAGE)
        world.batch.show()
        world.serve_all()
        assert os.fstat(fd).st_blocks == PAGE_SECTORS
        assert os.pread(fd, 3 * PAGE, 0) == bytes(PAGE) + b"w" * PAGE + bytes(PAGE)
        world.check_done()


def test_a_hole_is_somebody_elses():
    with batch_disk(by_hand(4), mapped=True) as world:
        os.ftruncate(world.disk.fd, 0)
        os.ftruncate(world.disk.fd, len(world.content))
        requests = [world.batch.put(IN, 0, size=512), world.batch.put(OUT, 8, b"w" * 512)]
        assert on_the_spot(world, requests) == [False, False]
        finish_by_hand(world)
        world.check_done()


def test_memory_that_is_the_disk_is_always_there():
    """DAX: there is no page cache to ask for."""
    with batch_disk(by_hand(4), mapped=True, prepare=lambda disk: disk.__setitem__("map_always", 1)) as world:
        os.ftruncate(world.disk.fd, 0)
        os.ftruncate(world.disk.fd, len(world.content))
        assert on_the_spot(world, [world.batch.put(IN, 0, size=512)]) == [True]
        world.check_done()


def test_long_requests_are_not_copied():
    with batch_disk(by_hand(4), mapped=True) as world:
        longest = int(COPY_MAX_BYTES)
        requests = [world.batch.put(IN, 0, size=longest), world.batch.put(IN, 0, size=longest + 512)]
        assert on_the_spot(world, requests) == [True, False]
        finish_by_hand(world)
        assert requests[0].data == world.content[:longest]
        assert requests[1].data == world.content[: longest + 512]
        world.check_done()


def test_what_was_added_behind_the_mapping_is_not_copied():
    def shorter(disk):
        disk["map_bytes"] = 512 * 512

    with batch_disk(by_hand(4), mapped=True, prepare=shorter) as world:
        requests = [world.batch.put(IN, sector, size=512) for sector in (511, 512)]
        requests.append(world.batch.put(OUT, 511, bytes(1024)))
        assert on_the_spot(world, requests) == [True, False, False]
        finish_by_hand(world)
        world.check_done()


def test_read_only_image_is_not_written_through_its_mapping():
    with batch_disk(by_hand(4), mapped=True, read_only=True) as world:
        write, read = world.batch.put(OUT, 0, bytes(512)), world.batch.put(IN, 0, size=512)
        assert on_the_spot(world, [write, read]) == [True, True]
        assert write.status != OK
        assert read.data == world.content[:512]
        world.check_done()


def test_write_through_is_not_a_copy():
    """A copy into the page cache is not on the disk."""
    with batch_disk(by_hand(4), mapped=True) as world:
        world.rings["write_through"] = 1
        write, read = world.batch.put(OUT, 0, b"t" * 512), world.batch.put(IN, 8, size=512)
        assert on_the_spot(world, [write, read]) == [False, True]
        (index,) = world.disk.others.given()
        assert world.disk.others.request_of(index)["write_through"]
        finish_by_hand(world)
        world.check_done()


def test_marks_are_made_anew():
    """A mark that comes round again must not be mistaken for one of long ago."""
    marks = np.zeros(8, np.uint8)
    disks = np.zeros(1, DISK)
    disk = disks[0]
    disk["granules_address"], disk["granules"], disk["granule_mark"] = marks.ctypes.data, len(marks), 1
    seen = []
    for _ in range(2 * MARK_MAX + 3):
        marks[3] = disk["granule_mark"]
        image_map.forget_marks(disk)
        seen.append(int(disk["granule_mark"]))
        assert 1 <= seen[-1] <= MARK_MAX
        assert not (marks == disk["granule_mark"]).any()
    assert len(set(seen)) == MARK_MAX


@KINDS
@pytest.mark.parametrize("lost", [False, True])
def test_copies_behind_one_that_failed(kind, lost):
    """One of four that are copied together counts as a SIGBUS; with `lost`, the file cannot be mapped there again."""
    opened = []

    def not_writable(disk):
        if lost:
            opened.append(os.open(f"/proc/self/fd/{int(disk['fd'])}", os.O_RDONLY))
            disk["fd"] = opened[0]

    with batch_disk(shared(kind), mapped=True, prepare=not_writable) as world:
        disk = world.disk.disks[0]
        requests = [world.batch.put(IN, sector, size=512) for sector in (5, 70, 9, 33)]
        # What is read there is taken for the counter of bus errors, which so changes while it is read.
        disk["bus_errors"] = world.table[0, ADDRESS] + np.uint64(requests[1].buffer)
        world.batch.show()
        world.serve_all()
        for request in requests:
            assert request.status == OK
            assert request.data == world.content[512 * request.sector :][:512]
        assert bool(disk["map_address"]) != lost
        world.check_done()
    for fd in opened:
        os.close(fd)
