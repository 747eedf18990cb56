"""Sets the machine's huge pages for a test, and puts them back; tells which pages a process really has."""

import contextlib
import fcntl
import os
import tempfile
from pathlib import Path

import pytest

from vvupipe.memory.huge_pages import NR_HUGEPAGES, SHMEM_ENABLED

PAGE = 2 << 20
KINDS = ("transparent", "reserved")
_LOCK = Path(tempfile.gettempdir()) / "vvupipe-test-huge-pages.lock"


@contextlib.contextmanager
def machine_with(kind, pages=0):
    """The machine gives shared memory transparent huge pages, has `pages` reserved ones of 2 MiB, or ("none") neither.

    One test of all that run at a time: these are settings of the machine.
    """
    if os.getuid() != 0:
        pytest.skip("setting up huge pages needs root")
    if not all(os.access(path, os.W_OK) for path in (SHMEM_ENABLED, NR_HUGEPAGES) if path.exists()):
        pytest.skip("the settings of huge pages cannot be written here")
    if not SHMEM_ENABLED.exists() or not NR_HUGEPAGES.exists() or meminfo("Hugepagesize") << 10 != PAGE:
        pytest.skip("this kernel has no huge pages of 2 MiB, or not both kinds")
    with _LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        enabled = SHMEM_ENABLED.read_text().split("[")[1].split("]")[0]
        reserved = NR_HUGEPAGES.read_text()
        try:
            SHMEM_ENABLED.write_text("advise" if kind == "transparent" else "never")
            free = meminfo("HugePages_Free") - meminfo("HugePages_Rsvd")
            NR_HUGEPAGES.write_text(str(meminfo("HugePages_Total") - free + (pages if kind == "reserved" else 0)))
            if kind == "reserved" and meminfo("HugePages_Free") - meminfo("HugePages_Rsvd") < pages:
                pytest.skip(f"the machine has no {pages} huge pages in one piece")
            yield
        finally:
            SHMEM_ENABLED.write_text(enabled)
            NR_HUGEPAGES.write_text(reserved)


def meminfo(name):
    """A figure of /proc/meminfo."""
    return int(
        next(line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith(name))
    )


def mapped(pid, kind, word):
    """(bytes touched, bytes of them in huge pages of that kind) of a process's mappings of the memfds named `word`."""
    resident = huge = 0
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        key, *rest = line.split()
        if not key.endswith(":"):
            inside = f"/memfd:{word}" in line
        elif inside and key in {"Rss:", "Shared_Hugetlb:", "Private_Hugetlb:"}:
            resident += int(rest[0]) << 10
        if (
            inside
            and key
            in {
                "transparent": {"ShmemPmdMapped:"},
                "reserved": {"Shared_Hugetlb:", "Private_Hugetlb:"},
            }[kind]
        ):
            huge += int(rest[0]) << 10
    return resident, huge
