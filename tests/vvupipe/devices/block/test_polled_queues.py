"""Whether a device can be polled for completions: none here can, as a rule, so each half is tried by itself."""

import errno
import os
import types

import pytest

from tests.kernels.others import needs_io_uring
from vvupipe.devices.block import polled_queues
from vvupipe.workers.io_uring import IoUring

BLOCK = 4096


@pytest.fixture
def image(tmp_path):
    """The fd of a file that was opened with O_DIRECT."""
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(BLOCK))
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        pytest.skip("the folder for temporary files has no direct I/O")
    yield fd
    os.close(fd)


@needs_io_uring
def test_one_block_is_read_to_find_out(image):
    with IoUring.open(1) as ring:
        assert polled_queues._read(ring, image, BLOCK) == BLOCK
    with IoUring.open(1) as ring:
        assert polled_queues._read(ring, image, BLOCK - 1) == -errno.EINVAL


@needs_io_uring
def test_a_read_that_never_comes_back(monkeypatch, image):
    monkeypatch.setattr(polled_queues, "_PATIENCE_S", 0.1)
    read_end, write_end = os.pipe()
    with IoUring.open(1) as ring:
        assert polled_queues._read(ring, read_end, BLOCK) is None
        os.close(write_end)
    os.close(read_end)


@needs_io_uring
def test_what_is_said_of_a_device(monkeypatch, image):
    monkeypatch.setattr(polled_queues, "_has_polled_queues", lambda status: False)
    assert "nvme.poll_queues" in polled_queues.missing(image, BLOCK)
    for result, words in ((BLOCK, None), (-errno.EOPNOTSUPP, "a read failed: Operation not supported")):
        for told in (True, None):
            monkeypatch.setattr(polled_queues, "_has_polled_queues", lambda status, told=told: told)
            monkeypatch.setattr(polled_queues, "_read", lambda *_, result=result: result)
            assert polled_queues.missing(image, BLOCK) == words
    monkeypatch.setattr(polled_queues, "_read", lambda *_: None)
    assert "did not come back" in polled_queues.missing(image, BLOCK)


@pytest.mark.parametrize(("text", "told"), [("1\n", True), ("0\n", False), (None, None)])
def test_what_sysfs_says_of_the_disk(monkeypatch, tmp_path, text, told):
    """Of a partition it is the disk that knows; what is on several disks has no number there."""
    (tmp_path / "sda" / "sda1").mkdir(parents=True)
    (tmp_path / "sda" / "sda1" / "partition").write_text("1\n")
    (tmp_path / "sda" / "queue").mkdir()
    if text:
        (tmp_path / "sda" / "queue" / "io_poll").write_text(text)
    for name, number in (("sda", 0x800), ("sda/sda1", 0x801)):
        (tmp_path / f"{os.major(number)}:{os.minor(number)}").symlink_to(tmp_path / name)
        status = types.SimpleNamespace(st_mode=0o060000, st_rdev=number, st_dev=0)
        monkeypatch.setattr(polled_queues.image_limits, "_DISKS", tmp_path)
        assert polled_queues._has_polled_queues(status) is told
        of_a_file = types.SimpleNamespace(st_mode=0o100000, st_rdev=0, st_dev=number)
        assert polled_queues._has_polled_queues(of_a_file) is told
