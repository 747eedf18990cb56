"""What is on a disk: a file system or a partition table, told by libblkid from the disk's first and last MiB.

libblkid (util-linux) is what mount and lsblk ask. It reads from a sparse memory file of the disk's size, so nothing of
the host's own devices is looked at.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass

#: Bytes at either end of the disk that are looked at; superblocks and partition tables lie there.
PROBE_BYTES = 1 << 20

# libblkid/blkid.h: BLKID_SUBLKS_LABEL, _UUID, _TYPE
_SUPERBLOCK_FLAGS = (1 << 1) | (1 << 3) | (1 << 5)
_FOUND, _NOTHING, _AMBIGUOUS = 0, 1, -2


@dataclass(frozen=True, slots=True)
class DiskContents:
    """What was found; all None on an empty disk. `unknown` says why nothing can be told."""

    file_system: str | None = None
    label: str | None = None
    uuid: str | None = None
    partition_table: str | None = None
    partitions: int | None = None
    unknown: str | None = None

    @property
    def text(self) -> str:
        """For a person: "ext4, label 'data', UUID ..." or "gpt partition table, 3 partitions"."""
        if self.unknown:
            return f"unknown: {self.unknown}"
        parts = []
        if self.file_system:
            parts.append(self.file_system)
            if self.label:
                parts.append(f"label '{self.label}'")
            if self.uuid:
                parts.append(f"UUID {self.uuid}")
        if self.partition_table:
            plural = "" if self.partitions == 1 else "s"
            parts.append(f"{self.partition_table} partition table, {self.partitions} partition{plural}")
        return ", ".join(parts) or "no file system or partition table"


def printable(data: bytes) -> str:
    """What a disk says of itself: it goes to a terminal, so that nothing but printable characters may."""
    return "".join(character if character.isprintable() else "?" for character in data.decode(errors="replace"))


def probe(size_bytes: int, sector_bytes: int, first: bytes, last: bytes) -> DiskContents:
    """Tell what is on a disk of `size_bytes` that begins with `first` and ends with `last`."""
    try:
        library = ctypes.CDLL("libblkid.so.1", use_errno=True)
    except OSError:
        return DiskContents(unknown="libblkid is not installed")
    fd = os.memfd_create("disk", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size_bytes)
        os.pwrite(fd, first, 0)
        os.pwrite(fd, last, max(0, size_bytes - len(last)))
        return _probe_fd(library, fd, sector_bytes)
    except OSError as error:
        return DiskContents(unknown=f"{error.strerror}")
    finally:
        os.close(fd)


def _probe_fd(library: ctypes.CDLL, fd: int, sector_bytes: int) -> DiskContents:
    library.blkid_new_probe.restype = ctypes.c_void_p
    library.blkid_probe_set_device.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    library.blkid_free_probe.argtypes = [ctypes.c_void_p]
    for name in ("enable_superblocks", "set_superblocks_flags", "enable_partitions", "set_sectorsize"):
        getattr(library, f"blkid_probe_{name}").argtypes = [ctypes.c_void_p, ctypes.c_uint]
    library.blkid_do_safeprobe.argtypes = [ctypes.c_void_p]
    handle = library.blkid_new_probe()
    if not handle:
        return DiskContents(unknown="libblkid failed to start")
    try:
        if library.blkid_probe_set_device(handle, fd, 0, 0):
            return DiskContents(unknown="libblkid cannot read the disk")
        library.blkid_probe_set_sectorsize(handle, sector_bytes)
        library.blkid_probe_enable_superblocks(handle, 1)
        library.blkid_probe_set_superblocks_flags(handle, _SUPERBLOCK_FLAGS)
        library.blkid_probe_enable_partitions(handle, 1)
        result = library.blkid_do_safeprobe(handle)
        if result == _AMBIGUOUS:
            return DiskContents(unknown="signatures of several file systems")
        if result not in (_FOUND, _NOTHING):
            return DiskContents(unknown="libblkid failed")
        table = _value(library, handle, "PTTYPE")
        return DiskContents(
            file_system=_value(library, handle, "TYPE"),
            label=_value(library, handle, "LABEL"),
            uuid=_value(library, handle, "UUID"),
            partition_table=table,
            partitions=_partitions(library, handle) if table else None,
        )
    finally:
        library.blkid_free_probe(handle)


def _value(library: ctypes.CDLL, handle: int, name: str) -> str | None:
    library.blkid_probe_lookup_value.argtypes = [
        ctypes.c_void_p,
        ctypes.c_char_p,
        ctypes.POINTER(ctypes.c_char_p),
        ctypes.POINTER(ctypes.c_size_t),
    ]
    data = ctypes.c_char_p()
    length = ctypes.c_size_t()
    if library.blkid_probe_lookup_value(handle, name.encode(), ctypes.byref(data), ctypes.byref(length)):
        return None
    return printable(data.value or b"")


def _partitions(library: ctypes.CDLL, handle: int) -> int:
    library.blkid_probe_get_partitions.restype = ctypes.c_void_p
    library.blkid_probe_get_partitions.argtypes = [ctypes.c_void_p]
    library.blkid_partlist_numof_partitions.argtypes = [ctypes.c_void_p]
    partitions = library.blkid_probe_get_partitions(handle)
    return int(library.blkid_partlist_numof_partitions(partitions)) if partitions else 0
