"""The RAM of an embedded device VM, and the slots that programs in the VM take of it.

The RAM is shared memory with guest-physical address 0 at its start: POSIX shared memory, or a memfd of huge pages,
which programs open by the VM's /proc/PID/fd and which nobody has to remove. A program locks its slot's bytes
(F_OFD_SETLK), so that the slots of a killed one are free again without anybody doing anything.
"""

from __future__ import annotations

import os

import posix_ipc

from vvupipe.errors import UserError
from vvupipe.memory import huge_pages, shared
from vvupipe.memory.huge_pages import HugePages
from vvupipe.memory.mapping import Mapping
from vvupipe.memory.range_lock import try_lock

SLOT_BYTES = 1 << 20
_FIRST_SLOT = 1  # low memory stays unused, so that no ring has address 0
_MEMFD_FOLDER = "/proc"  # a RAM whose name begins so is of huge pages


class GuestRam:
    """The VM's own hold on its RAM: removes the name at the end. pages: None for pages of the usual size."""

    def __init__(self, vm_name: str, size_bytes: int, pages: HugePages | None = None) -> None:
        """Raises: UserError when there is no room for it."""
        self.name = f"{shared.PREFIX}{os.getuid()}-{vm_name}-{os.getpid()}"
        self.size_bytes = size_bytes
        self.pages = pages
        if pages is not None:
            self._fd = huge_pages.create(self.name[1:], size_bytes, pages)
            self.name = f"{_MEMFD_FOLDER}/{os.getpid()}/fd/{self._fd}"
            return
        try:
            self._fd = shared.create_named(self.name, size_bytes)
        except posix_ipc.ExistentialError:
            # Only a killed process with our number can have left it.
            shared.unlink(self.name)
            self._fd = shared.create_named(self.name, size_bytes)

    def close(self) -> None:
        """Give the RAM up; programs that still have it keep what they mapped."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            if self.pages is None:
                shared.unlink(self.name)


class RamSlot:
    """One slot of a VM's RAM, ours until closed: implements vvu.driver.DmaBuffer."""

    def __init__(self, fd: int, offset: int, *, huge: bool) -> None:
        self.fd = fd
        self.fd_offset = offset
        self.gpa = offset
        self.size_bytes = SLOT_BYTES
        self._mapping = Mapping(fd, SLOT_BYTES, offset, huge=huge)
        self.view = self._mapping.view

    @classmethod
    def take(cls, ram_name: str) -> RamSlot:
        """The first free slot. Raises: UserError when the RAM is gone or every slot is taken."""
        huge = ram_name.startswith(_MEMFD_FOLDER)
        try:
            fd = os.open(ram_name, os.O_RDWR | os.O_CLOEXEC) if huge else int(posix_ipc.SharedMemory(ram_name).fd)
        except (posix_ipc.ExistentialError, FileNotFoundError):
            raise UserError(f"the VM's memory {ram_name} is gone: start the VM again") from None
        except PermissionError:
            raise UserError(
                f"the VM's memory {ram_name} is another user's: run as the one who started the VM"
            ) from None
        os.set_inheritable(fd, False)
        for slot in range(_FIRST_SLOT, os.fstat(fd).st_size // SLOT_BYTES):
            if try_lock(fd, slot * SLOT_BYTES, SLOT_BYTES):
                return cls(fd, slot * SLOT_BYTES, huge=huge)
        os.close(fd)
        raise UserError("every program slot of the VM's memory is taken: stop one or give the VM more --mem")

    def close(self) -> None:
        """Free the slot. Harmless when called again."""
        if self.fd >= 0:
            self._mapping.close()
            os.close(self.fd)
            self.fd = -1
