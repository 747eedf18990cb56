import shutil
import struct
import subprocess
import zlib

import pytest

from vvupipe.vm import disk_probe
from vvupipe.vm.disk_probe import PROBE_BYTES, probe

pytestmark = pytest.mark.timeout(60)
SIZE = 32 << 20


def probe_file(path):
    content = path.read_bytes()
    return probe(len(content), 512, content[:PROBE_BYTES], content[-PROBE_BYTES:])


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    with open(path, "wb") as file:
        file.truncate(SIZE)
    return path


def test_an_empty_disk(image):
    assert probe_file(image).text == "no file system or partition table"


@pytest.mark.parametrize(
    ("program", "options", "expected"),
    [
        ("mkfs.ext4", ["-q", "-F", "-L", "data"], "ext4, label 'data', UUID "),
        ("mkfs.ext2", ["-q", "-F"], "ext2, UUID "),
        ("mkswap", ["-L", "swapping"], "swap, label 'swapping', UUID "),
    ],
)
def test_file_systems(image, program, options, expected):
    tool = shutil.which(program, path="/usr/sbin:/sbin:/usr/bin:/bin")
    if not tool:
        pytest.skip(f"{program} is not installed")
    subprocess.run([tool, *options, image], check=True, capture_output=True)
    assert probe_file(image).text.startswith(expected)


def mbr(*partitions):
    table = b"".join(struct.pack("<B3xB3xII", 0, kind, start, count) for kind, start, count in partitions)
    return bytes(446) + table.ljust(64, b"\0") + b"\x55\xaa"


def test_an_mbr(image):
    image.write_bytes(mbr((0x83, 2048, 2048), (0x82, 4096, 4096)).ljust(SIZE, b"\0"))
    assert probe_file(image).text == "dos partition table, 2 partitions"


def gpt(own_lba, other_lba, entries_lba, entries):
    head = struct.pack("<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, 92, 0, 0, own_lba, other_lba, 34,
                       SIZE // 512 - 34, bytes(range(16)), entries_lba, 128, 128, zlib.crc32(entries))  # fmt: skip
    return head[:16] + struct.pack("<I", zlib.crc32(head)) + head[20:]


def test_a_gpt_that_is_only_at_the_end(image):
    """The first one is destroyed: what is read at the disk's end must be at its end."""
    entry = struct.pack("<16s16sQQQ72s", b"L" * 16, b"u" * 16, 2048, 4095, 0, b"")
    entries = entry.ljust(128 * 128, b"\0")
    last = SIZE // 512 - 1
    content = bytearray(SIZE)
    content[:512] = mbr((0xEE, 1, last))
    content[(last - 32) * 512 : last * 512] = entries
    content[last * 512 : last * 512 + 92] = gpt(last, 1, last - 32, entries)
    image.write_bytes(content)
    assert probe_file(image).text == "gpt partition table, 1 partition"


def test_a_small_disk(tmp_path):
    path = tmp_path / "small"
    path.write_bytes(bytes(4096))
    assert probe_file(path).text == "no file system or partition table"


def test_a_label_cannot_write_to_the_terminal(image):
    tool = shutil.which("mkfs.ext4", path="/usr/sbin:/sbin")
    if not tool:
        pytest.skip("mkfs.ext4 is not installed")
    subprocess.run([tool, "-q", "-F", "-L", "xxxx", image], check=True, capture_output=True)
    subprocess.run([shutil.which("tune2fs", path="/usr/sbin:/sbin"), "-L", "a\x1b[2Jb", image], check=True,
                   capture_output=True)  # fmt: skip
    text = probe_file(image).text
    assert "\x1b" not in text
    assert "label 'a" in text


def test_without_the_library(image, monkeypatch):
    def missing(*_, **__):
        raise OSError("no such library")

    monkeypatch.setattr(disk_probe.ctypes, "CDLL", missing)
    assert probe_file(image).text == "unknown: libblkid is not installed"
