"""A front-end's requests about memory: table, slots, translations, dirty-page log, postcopy."""

from __future__ import annotations

from collections.abc import Sequence

from kernels.virtio_layout import F_ACCESS_PLATFORM
from vvupipe.errors import ProtocolError, Refused
from vvupipe.memory.region import MemoryRegion
from vvupipe.vhost_user.frontend_connection import FrontendConnection
from vvupipe.vhost_user.messages import Message, Request
from vvupipe.vhost_user.payloads import (
    MAX_REGIONS,
    IotlbEntry,
    IotlbType,
    LogArea,
    RegionEntry,
    pack_memory_table,
    pack_single_region,
    pack_u64,
    unpack_memory_table,
    unpack_u64,
)
from vvupipe.vhost_user.transport import FileArea


class FrontendMemory(FrontendConnection):
    """Requests about memory. Errors: see FrontendConnection. fds that are sent stay the caller's."""

    async def set_memory_table(self, regions: Sequence[MemoryRegion]) -> None:
        """SET_MEM_TABLE, of at most 8 regions."""
        await self._tell(Request.SET_MEM_TABLE, _table(regions), [region.fd for region in regions])

    async def get_max_mem_slots(self) -> int:
        """GET_MAX_MEM_SLOTS."""
        return await self._ask_u64(Request.GET_MAX_MEM_SLOTS)

    async def add_mem_reg(self, region: MemoryRegion) -> None:
        """ADD_MEM_REG."""
        await self._tell(Request.ADD_MEM_REG, pack_single_region(_entry(region)), [region.fd])

    async def rem_mem_reg(self, region: MemoryRegion) -> None:
        """REM_MEM_REG. No fd goes with it."""
        await self._tell(Request.REM_MEM_REG, pack_single_region(_entry(region)))

    # Translations.

    async def update_iotlb(self, iova: int, size_bytes: int, uva: int, permissions: int) -> None:
        """IOTLB_MSG: `iova` is at `uva` from now on. permissions: ACCESS_READ, ACCESS_WRITE or both."""
        await self._iotlb(IotlbEntry(iova, size_bytes, uva, permissions, IotlbType.UPDATE))

    async def invalidate_iotlb(self, iova: int, size_bytes: int) -> None:
        """IOTLB_MSG: `iova` is nowhere from now on."""
        await self._iotlb(IotlbEntry(iova, size_bytes, 0, 0, IotlbType.INVALIDATE))

    async def _iotlb(self, entry: IotlbEntry) -> None:
        self.needs_feature(Request.IOTLB_MSG, F_ACCESS_PLATFORM, "VIRTIO_F_ACCESS_PLATFORM")
        if code := await self._ask_u64(Request.IOTLB_MSG, entry.pack()):
            raise Refused(f"the back-end refused IOTLB_MSG (code {code:#x})")

    # Dirty-page log.

    async def set_log_base(self, area: FileArea) -> int | None:
        """SET_LOG_BASE: where dirty pages are marked while VHOST_F_LOG_ALL is set.

        Returns the answer's number, None when it has none: the specification gives it no meaning. vvupipe answers 0
        when it was done, libvhost-user the size.
        """
        answer = await self._ask(Request.SET_LOG_BASE, LogArea(area.size_bytes, area.offset).pack(), [area.fd])
        return unpack_u64(answer) if answer.payload else None

    async def set_log_fd(self, fd: int) -> None:
        """SET_LOG_FD: the eventfd that the back-end writes when it marked pages."""
        await self._tell(Request.SET_LOG_FD, b"", [fd])

    # Postcopy ("Migration" with PAGEFAULT).

    async def postcopy_advise(self) -> int:
        """POSTCOPY_ADVISE: the back-end's userfaultfd, owned by the caller."""
        return (await self._ask(Request.POSTCOPY_ADVISE, brings_fd=True)).take_fd()

    async def postcopy_listen(self) -> None:
        """POSTCOPY_LISTEN: what of the next memory table is missing faults. There must be no memory yet."""
        await self._tell(Request.POSTCOPY_LISTEN)

    async def set_memory_table_postcopy(self, regions: Sequence[MemoryRegion]) -> list[RegionEntry]:
        """SET_MEM_TABLE after POSTCOPY_LISTEN: the table with the back-end's own addresses in the third column.

        The back-end waits until it is told (here) that they are known.
        """
        self.needs(Request.POSTCOPY_LISTEN)
        fds = [region.fd for region in regions]
        message = Message(Request.SET_MEM_TABLE, _table(regions), fds=fds)
        entries = unpack_memory_table(await self._request(message, timeout_s=self.answer_timeout_s))
        if [(entry.gpa, entry.size_bytes) for entry in entries] != [(part.gpa, part.size_bytes) for part in regions]:
            raise ProtocolError("SET_MEM_TABLE was answered with another table")
        await self.send_raw(Message(Request.SET_MEM_TABLE, pack_u64(0)), answered=False)
        return entries

    async def postcopy_end(self) -> None:
        """POSTCOPY_END: nothing faults any more."""
        if code := await self._ask_u64(Request.POSTCOPY_END):
            raise Refused(f"the back-end refused POSTCOPY_END (code {code:#x})")


def _entry(region: MemoryRegion) -> RegionEntry:
    return RegionEntry(region.gpa, region.size_bytes, region.uva, region.fd_offset)


def _table(regions: Sequence[MemoryRegion]) -> bytes:
    if not 1 <= len(regions) <= MAX_REGIONS:
        raise ValueError(f"a memory table of {len(regions)} regions, 1 to {MAX_REGIONS} are possible")
    return pack_memory_table(_entry(region) for region in regions)
