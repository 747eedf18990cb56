"""A kernel image without its compression.

An emulated CPU takes longer to unpack Linux (3 to 4 s) than to boot it. QEMU starts an ELF kernel that has a PVH entry.
"""

import bz2
import lzma
import shutil
import struct
import subprocess
import zlib

_SETUP_SECTORS_AT = 0x1F1  # Linux Documentation/arch/x86/boot.rst
_MAGIC_AT = 0x202
_PAYLOAD_AT = 0x248  # le32 offset from the protected-mode code, le32 length
_SECTOR = 512
_PVH_NOTE = 18  # xen/include/public/elfnote.h: XEN_ELFNOTE_PHYS32_ENTRY


def unpacked(image):
    """The ELF kernel in the bzImage `image` (bytes); None for an unknown packing or a kernel that QEMU cannot start."""
    if image[_MAGIC_AT : _MAGIC_AT + 4] != b"HdrS":
        return None
    offset, length = struct.unpack_from("<II", image, _PAYLOAD_AT)
    start = ((image[_SETUP_SECTORS_AT] or 4) + 1) * _SECTOR + offset
    try:
        kernel = _unpack(image[start : start + length])
    except (OSError, EOFError, zlib.error, lzma.LZMAError, subprocess.CalledProcessError):
        return None
    return kernel if kernel[:4] == b"\x7fELF" and _has_pvh_entry(kernel) else None


def _unpack(payload):
    """The payload ends with the kernel's size, which is not part of the compressed stream."""
    if payload.startswith(b"\xfd7zXZ\0") or payload.startswith(b"\x5d\0\0"):
        return lzma.LZMADecompressor().decompress(payload)
    if payload.startswith(b"\x1f\x8b"):
        return zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(payload)
    if payload.startswith(b"BZh"):
        return bz2.BZ2Decompressor().decompress(payload)
    if payload.startswith(b"\x28\xb5\x2f\xfd") and shutil.which("zstd"):
        done = subprocess.run(["zstd", "-dcq"], input=payload[:-4], stdout=subprocess.PIPE, check=True)
        return done.stdout
    return b""


def _has_pvh_entry(kernel):
    return any(struct.pack("<III4s", 4, size, _PVH_NOTE, b"Xen\0") in kernel for size in (4, 8))
