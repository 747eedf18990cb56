"""Shared memory in huge pages, for a VM's RAM: transparent ones where the kernel gives them, else reserved ones.

Both are memfds. POSIX shared memory has no part in it: the pages of /dev/shm follow its mount's `huge=`, those of a
memfd shmem_enabled (Linux: Documentation/admin-guide/mm/transhuge.rst), and it has no reserved ones.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from pathlib import Path

from vvupipe.errors import UserError
from vvupipe.memory.mapping import Mapping, transparent_page_bytes
from vvupipe.units import human_bytes

SHMEM_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
NR_HUGEPAGES = Path("/proc/sys/vm/nr_hugepages")
_MEMINFO = Path("/proc/meminfo")
_SMAPS = Path("/proc/self/smaps")


@dataclass(frozen=True, slots=True)
class HugePages:
    """A kind of huge pages. reserved: of the pool of hugetlbfs, transparent otherwise."""

    page_bytes: int
    reserved: bool

    def __str__(self) -> str:
        return f"huge pages ({human_bytes(self.page_bytes)}), {'reserved' if self.reserved else 'transparent'}"


def pages_text(pages: HugePages | None) -> str:
    """What kind of pages a RAM has; None: what the machine has anyway."""
    return str(pages) if pages else f"pages of {human_bytes(mmap.PAGESIZE)}"


def choose(size_bytes: int) -> HugePages:
    """The kind that a RAM of `size_bytes` can have now. Raises: UserError, which says what to do, when it is none."""
    transparent = _transparent()
    reserved = _reserved()
    found = transparent
    if found is None and reserved is not None and size_bytes <= _unpromised(reserved):
        found = reserved
    if found is None:
        raise UserError(f"no huge pages for {size_bytes >> 20} MiB of RAM: {_what_to_do(size_bytes, reserved)}")
    if size_bytes % found.page_bytes:
        whole = -(-size_bytes // found.page_bytes) * found.page_bytes
        raise UserError(
            f"--mem {size_bytes >> 20}: RAM in {found} is a multiple of {human_bytes(found.page_bytes)}: "
            f"use --mem {whole >> 20}"
        )
    return found


def create(name: str, size_bytes: int, pages: HugePages) -> int:
    """An fd of new, zeroed memory of that kind, called `name` in /proc/PID/maps and nowhere else.

    Reserved pages are all promised to it from here on; transparent ones are given when Mapping(..., huge=True) is
    touched, where the kernel finds them. Raises: UserError when there is no room.
    """
    available = _meminfo("MemAvailable") << 10
    if not pages.reserved and size_bytes > available:
        raise UserError(
            f"no room for {size_bytes >> 20} MiB of RAM, {available >> 20} MiB are available: use a smaller --mem"
        )
    fd = os.memfd_create(name, os.MFD_CLOEXEC | (os.MFD_HUGETLB if pages.reserved else 0))
    try:
        os.ftruncate(fd, size_bytes)
        if pages.reserved:
            # The first mapping reserves, for as long as the file is; without that a touch could end in a SIGBUS.
            Mapping(fd, size_bytes).close()
    except OSError as error:
        os.close(fd)
        raise UserError(f"no room for {size_bytes >> 20} MiB of RAM in {pages}: {error.strerror}") from error
    return fd


def _transparent() -> HugePages | None:
    """Found by trying: what sysfs says is not all (a page size's own setting, prctl, how fragmented memory is)."""
    page_bytes = transparent_page_bytes()
    if not page_bytes:
        return None
    fd = os.memfd_create("vvupipe-trial", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, page_bytes)
        with Mapping(fd, page_bytes, huge=True) as mapping:
            mapping.view[0] = 1
            huge = _huge_bytes(mapping.address) == page_bytes
    finally:
        os.close(fd)
    return HugePages(page_bytes, reserved=False) if huge else None


def _huge_bytes(address: int) -> int:
    """How much of the mapping that begins at `address` is transparent huge pages of shared memory."""
    inside = False
    for line in _SMAPS.read_text().splitlines():
        key, _, rest = line.partition(" ")
        if not key.endswith(":"):
            inside = int(key.partition("-")[0], 16) == address
        elif inside and key == "ShmemPmdMapped:":
            return int(rest.split()[0]) << 10
    return 0


def _reserved() -> HugePages | None:
    """The default kind of hugetlbfs, which memfd_create takes; None in a kernel without it."""
    page_bytes = _meminfo("Hugepagesize") << 10
    return HugePages(page_bytes, reserved=True) if page_bytes else None


def _unpromised(pages: HugePages) -> int:
    """Bytes of the pool that nobody has or was promised."""
    return (_meminfo("HugePages_Free") - _meminfo("HugePages_Rsvd")) * pages.page_bytes


def _what_to_do(size_bytes: int, reserved: HugePages | None) -> str:
    ways = []
    if transparent_page_bytes():
        ways.append(f"as root, echo advise > {SHMEM_ENABLED}")
    if reserved is not None:
        missing = -(-(size_bytes - _unpromised(reserved)) // reserved.page_bytes)
        ways.append(f"sysctl vm.nr_hugepages={_meminfo('HugePages_Total') + missing}")
    return " (or ".join(ways) + ")" * (len(ways) - 1) if ways else "this kernel has none"


def _meminfo(name: str) -> int:
    """A figure of /proc/meminfo, in KiB or pages; 0 when it has none of that name."""
    for line in _MEMINFO.read_text().splitlines():
        key, _, rest = line.partition(":")
        if key == name:
            return int(rest.split()[0])
    return 0
