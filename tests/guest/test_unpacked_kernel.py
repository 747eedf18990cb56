"""tests/guest/unpacked_kernel.py: a bzImage of each packing, and images that are none."""

import bz2
import gzip
import lzma
import struct

import pytest
from guest_kit import kernel, packed_kernel
from unpacked_kernel import unpacked

pytestmark = pytest.mark.timeout(60)

ELF = b"\x7fELF" + bytes(range(256)) * 40 + struct.pack("<III4sQ", 4, 8, 18, b"Xen\0", 0x1000000)


def bz_image(packed, setup_sectors=3):
    """The fields of the boot protocol that lead to the payload, which its size follows."""
    image = bytearray((setup_sectors + 1) * 512)
    image[0x1F1] = setup_sectors
    image[0x202:0x206] = b"HdrS"
    payload = packed + struct.pack("<I", len(ELF))
    struct.pack_into("<II", image, 0x248, 100, len(payload))
    return bytes(image) + b"\xcc" * 100 + payload + b"\xcc" * 50


def legacy_lzma(data):
    return lzma.compress(data, lzma.FORMAT_ALONE)


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, legacy_lzma])
def test_each_packing(pack):
    assert unpacked(bz_image(pack(ELF))) == ELF


@pytest.mark.parametrize(
    "image",
    [
        b"",
        ELF,
        bz_image(b"\x02\x21\x4c\x18" + bytes(100)),  # lz4
        bz_image(lzma.compress(b"something else")),
        bz_image(lzma.compress(ELF[:1000])),  # no PVH entry
        bz_image(lzma.compress(ELF)[:20] + bytes(100)),
        bz_image(gzip.compress(ELF)[:20] + b"\xff" * 100),
    ],
)
def test_what_cannot_be_unpacked_is_left_as_it_is(image):
    assert unpacked(image) is None


def test_the_kernel_of_this_machine():
    image = kernel().image
    assert kernel().version == packed_kernel().version
    if image != packed_kernel().image:
        assert image.read_bytes()[:4] == b"\x7fELF"
