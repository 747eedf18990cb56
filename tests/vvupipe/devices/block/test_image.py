"""Images that can be served and images that cannot: one clear line each."""

import os

import pytest

from tests import loop_device
from vvupipe.devices.block.image import open_image
from vvupipe.errors import UserError


def opened(path, **options):
    return open_image(path, **{"read_only": False, "block_size_bytes": 512, "serial": None, "lock": False, **options})


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(8192))
    return path


def test_image(image):
    disk = opened(image)
    assert (disk.size_bytes, disk.block_size_bytes, disk.read_only) == (8192, 512, False)
    assert disk.serial.startswith("vvu-")
    assert len(disk.serial) == 20
    os.ftruncate(disk.fd, 4096)
    assert disk.current_size_bytes() == 4096
    disk.close()


@pytest.mark.parametrize("block_bytes", [512, 4096])
def test_a_block_device_keeps_its_blocks(tmp_path, block_bytes):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    with loop_device.attached(path, block_bytes) as device:
        for wanted, offered in ((None, block_bytes), (512, 512), (4096, 4096)):
            disk = opened(device, block_size_bytes=wanted)
            assert disk.block_size_bytes == offered
            disk.close()


def test_serial_is_the_same_for_the_same_file(image, tmp_path):
    (tmp_path / "link").symlink_to(image)
    assert opened(image).serial == opened(tmp_path / "link").serial


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such image"),
        (lambda path: path.mkdir(), "is a folder"),
        (os.mkfifo, "neither a regular file nor a block device"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(bytes(1000)), "not a multiple of the block size 512.*truncate -s 1024"),
    ],
)
def test_what_cannot_be_served(tmp_path, make, message):
    path = tmp_path / "disk.img"
    make(path)
    with pytest.raises(UserError, match=message) as caught:
        opened(path)
    assert "\n" not in str(caught.value)


def test_size_that_fits_only_smaller_blocks(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096 + 512))
    with pytest.raises(UserError, match="or use --block-size 512"):
        opened(path, block_size_bytes=4096)


@pytest.mark.parametrize("size", [0, 100, 513, 8192])
def test_block_sizes_that_are_none(image, size):
    with pytest.raises(UserError, match="use one of 512, 1024, 2048, 4096"):
        opened(image, block_size_bytes=size)


@pytest.mark.parametrize("serial", ["x" * 21, "sérial"])
def test_serials_that_are_none(image, serial):
    with pytest.raises(UserError, match="at most 20 ASCII characters"):
        opened(image, serial=serial)
