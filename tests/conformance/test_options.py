"""What the options of `vvupipe device block` change for a driver, by socket and through a VVU function."""

import os
import struct

import pytest

from tests.conformance.carriers import CARRIERS
from tests.mock import frontend as fe
from tests.mock.blk_batch import BlkBatch
from tests.mock.blk_driver import GET_ID, IN, IOERR, OK, OUT, UNSUPP, started_disk
from vvupipe.workers.io_uring import available

pytestmark = pytest.mark.timeout(60)

MIB = 1 << 20
DISCARD, WRITE_ZEROES = 11, 13


@pytest.fixture(params=["socket", "vvu"])
def serve(request, tmp_path):
    """serve(*options): a context manager; the image is `tmp_path / disk.img`."""
    (tmp_path / "disk.img").write_bytes(os.urandom(4 * MIB))
    return lambda *options: CARRIERS[request.param](tmp_path, tmp_path / "disk.img", *options)


@pytest.fixture
def image(tmp_path):
    return tmp_path / "disk.img"


def zeroes(disk, sector, sectors, kind=WRITE_ZEROES, flags=0):
    return disk.request(kind, data=struct.pack("<QII", sector, sectors, flags))[0]


def test_read_only(serve, image):
    content = image.read_bytes()
    with serve("--read-only") as backend, started_disk(backend.socket) as (frontend, disk):
        offered = frontend.ask_u64(fe.GET_FEATURES)
        assert offered & fe.F_BLK_RO
        assert not offered & (fe.F_BLK_DISCARD | fe.F_BLK_WRITE_ZEROES)
        assert disk.read(8, 4096) == content[4096:8192]
        assert disk.request(OUT, 0, bytes(512))[0] == IOERR
        assert zeroes(disk, 0, 8) == UNSUPP
        assert zeroes(disk, 0, 8, DISCARD) == UNSUPP
        disk.flush()
    assert image.read_bytes() == content


def test_direct(serve, image):
    content = image.read_bytes()
    with serve("--direct") as backend, started_disk(backend.socket) as (frontend, disk):
        (block,) = struct.unpack("<I", frontend.get_config(20, 4))
        assert block in (512, 4096)
        assert disk.read(0, 8192) == content[:8192]
        disk.buffer += 3  # guest memory that O_DIRECT would not take
        assert disk.read(8, 4096) == content[4096:8192]
        disk.write(16, b"d" * 8192)
        disk.flush()
        assert disk.read(16, 8192) == b"d" * 8192
    assert image.read_bytes() == content[:8192] + b"d" * 8192 + content[16384:]


def test_write_through_from_the_start(serve):
    with serve("--cache", "writethrough") as backend, started_disk(backend.socket) as (frontend, disk):
        assert frontend.get_config(32, 1) == b"\0"
        disk.write(0, b"t" * 512)
        assert disk.read(0, 512) == b"t" * 512


def test_not_sparse(serve, image):
    before = image.stat().st_blocks
    with serve("--no-sparse") as backend, started_disk(backend.socket) as (frontend, disk):
        assert not frontend.ask_u64(fe.GET_FEATURES) & fe.F_BLK_DISCARD
        assert zeroes(disk, 0, 2048, DISCARD) == UNSUPP
        assert frontend.get_config(56, 1) == b"\0", "unmap gives nothing back"
        assert zeroes(disk, 0, 2048, flags=1) == OK
        assert disk.request(IN, 0, size=4096)[1] == bytes(4096)
        disk.flush()
    assert image.stat().st_blocks >= before


needs_io_uring = pytest.mark.skipif(available() is not None, reason=f"io_uring: {available()}")
ENGINES = {
    "mmap": ("--engine", "mmap"),
    "mmap sqpoll": ("--engine", "mmap", "--sqpoll"),
    "uring": ("--engine", "uring"),
    "uring sqpoll": ("--engine", "uring", "--sqpoll"),
    "uring direct": ("--engine", "uring", "--direct"),
    "uring sqpoll direct": ("--engine", "uring", "--sqpoll", "--direct"),
    "sync": ("--engine", "sync"),
    "sync direct": ("--engine", "sync", "--direct"),
}


def of_engine(name):
    return pytest.param(ENGINES[name], marks=needs_io_uring if "uring" in name or "sqpoll" in name else (), id=name)


@pytest.mark.parametrize("options", [of_engine(name) for name in ENGINES])
def test_every_kind_of_request_by_each_engine(serve, image, options):
    content = bytearray(image.read_bytes())
    with serve(*options) as backend, started_disk(backend.socket, size=128) as (_, disk):
        batch = BlkBatch(disk.ring)
        reads = [batch.put(IN, 64 * k, size=4096) for k in range(20)]
        writes = [batch.put(OUT, 4096 + 8 * k, bytes([k + 1]) * 4096) for k in range(10)]
        batch.show()
        batch.wait()
        assert {request.status for request in batch.done} == {OK}
        for request in reads:
            assert request.data == content[request.sector * 512 : request.sector * 512 + 4096]
        for request in writes:
            content[request.sector * 512 : request.sector * 512 + 4096] = request.data
        disk.flush()
        assert zeroes(disk, 2048, 16) == OK
        content[2048 * 512 : 2064 * 512] = bytes(16 * 512)
        assert zeroes(disk, 3072, 16, DISCARD) == OK
        content[3072 * 512 : 3088 * 512] = bytes(16 * 512)
        assert disk.request(GET_ID, size=20)[0] == OK
        assert disk.request(99)[0] == UNSUPP
        assert disk.request(IN, 1 << 40, size=4096)[0] == IOERR
        disk.buffer += 5
        disk.write(4000, b"u" * 8192)
        content[4000 * 512 : 4000 * 512 + 8192] = b"u" * 8192
        assert disk.read(4000, 8192) == b"u" * 8192
        disk.flush()
        assert disk.read(0, 1 << 19) == content[: 1 << 19]
    assert image.read_bytes() == content
