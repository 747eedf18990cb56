"""A session's memory: table, slots, translations, dirty-page log."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from collections.abc import Callable
from functools import partial

from kernels.virtio_layout import ACCESS_REFUSED
from vvupipe.errors import Disconnected, ProtocolError, TransportError, WorkerError
from vvupipe.memory.iotlb import Translation
from vvupipe.memory.region import MemoryRegion, close_regions
from vvupipe.vhost_user.back_end_channel import BackendChannel
from vvupipe.vhost_user.messages import BackendRequest, Message
from vvupipe.vhost_user.payloads import (
    ACCESS_READ,
    ACCESS_WRITE,
    IotlbEntry,
    IotlbType,
    LogArea,
    pack_u64,
    unpack_memory_table,
    unpack_single_region,
)
from vvupipe.vhost_user.transport import Connection, FileArea
from vvupipe.workers.pool import WorkerPool

log = logging.getLogger(__name__)

MEM_SLOTS_MAX = 509  #: as QEMU's KVM on x86; what a worker maps is limited by vm.max_map_count only
_PAGE = 4096
_FRUITLESS_MAX = 8  # answers without a translation in a row, before it is taken for one that is not there
_ADDRESS_END = 1 << 64


class SessionMemory:
    """What a front-end tells of its memory, handed on to the pool."""

    def __init__(self, connection: Connection, pool: WorkerPool) -> None:
        self._connection = connection
        self._pool = pool
        self._regions: list[MemoryRegion] = []
        self._slots: dict[tuple[int, int, int], list[MemoryRegion]] = {}
        self._log: FileArea | None = None
        self._logging = False
        self._fruitless: dict[int, tuple[int, int]] = {}
        self._known: dict[int, int] = {}  # vring -> an address it lacks though it is known, as of the last message
        self._asking: dict[int, asyncio.Task[bool]] = {}
        self.channel: Callable[[], BackendChannel | None] = lambda: None
        pool.on_waiting = self._ask_all

    @property
    def known(self) -> bool:
        """Whether there is any memory."""
        return bool(self._regions)

    async def close(self) -> None:
        """Forget everything."""
        self._pool.on_waiting = lambda: None
        for task in self._asking.values():
            task.cancel()
        await asyncio.gather(*self._asking.values(), return_exceptions=True)
        self._drop_log()
        await self._pool.set_log(-1, 0, 0)
        await self._pool.set_log_event(-1)
        await self._pool.forget_translations()
        await self._pool.set_memory([])

    # Regions.

    async def set_table(self, message: Message) -> None:
        """SET_MEM_TABLE."""
        regions = await self._connection.memory_regions(message)
        await self._use(regions)
        self._slots = {
            (entry.gpa, entry.uva, entry.size_bytes): [
                region for region in regions if entry.uva <= region.uva < entry.uva + entry.size_bytes
            ]
            for entry in unpack_memory_table(message)
        }
        log.info("memory table: %d regions, %d MiB", len(regions), sum(r.size_bytes for r in regions) >> 20)

    async def get_max_slots(self, message: Message) -> bytes:
        """GET_MAX_MEM_SLOTS."""
        return pack_u64(MEM_SLOTS_MAX)

    async def add_region(self, message: Message) -> None:
        """ADD_MEM_REG."""
        entry = unpack_single_region(message)
        key = (entry.gpa, entry.uva, entry.size_bytes)
        if len(self._slots) >= MEM_SLOTS_MAX:
            raise ProtocolError(f"more than {MEM_SLOTS_MAX} memory slots")
        added = await self._connection.added_region(message)
        await self._use([*self._regions, *added])
        self._slots[key] = added
        log.info("memory slot added: %d MiB at %#x", entry.size_bytes >> 20, entry.gpa)

    async def remove_region(self, message: Message) -> None:
        """REM_MEM_REG; an fd that comes with it is closed unused."""
        entry = unpack_single_region(message)
        removed = self._slots.get((entry.gpa, entry.uva, entry.size_bytes))
        if removed is None:
            raise ProtocolError(f"there is no memory slot of {entry.size_bytes:#x} bytes at {entry.gpa:#x}")
        await self._use([region for region in self._regions if not any(region is gone for gone in removed)])
        del self._slots[(entry.gpa, entry.uva, entry.size_bytes)]
        log.info("memory slot removed: %d MiB at %#x", entry.size_bytes >> 20, entry.gpa)

    async def _use(self, regions: list[MemoryRegion]) -> None:
        ordered = sorted(regions, key=lambda region: region.gpa)
        for before, after in itertools.pairwise(ordered):
            if before.gpa + before.size_bytes > after.gpa:
                close_regions([region for region in regions if not any(region is old for old in self._regions)])
                raise ProtocolError(f"memory regions overlap at {after.gpa:#x}")
        await self._pool.set_memory(regions)
        self._regions = regions

    # Translations.

    async def iotlb(self, message: Message) -> bytes:
        """IOTLB_MSG: the reply says whether it was understood."""
        try:
            entry = IotlbEntry.unpack(message)
            log.debug("IOTLB message %d: %#x bytes at %#x", entry.kind, entry.size_bytes, entry.iova)
            self._known.clear()
            if not entry.size_bytes or entry.iova + entry.size_bytes > _ADDRESS_END:
                raise ProtocolError(f"a translation of {entry.size_bytes:#x} bytes at {entry.iova:#x}")
            if entry.kind == IotlbType.UPDATE:
                await self._update(entry)
            elif entry.kind == IotlbType.INVALIDATE:
                await self._pool.change_translations(invalidate=[(entry.iova, entry.size_bytes)])
            else:
                raise ProtocolError(f"an IOTLB message of type {entry.kind} from a front-end")
        except (ProtocolError, WorkerError) as error:
            log.warning("IOTLB_MSG refused: %s", error)
            return pack_u64(1)
        return pack_u64(0)

    async def _update(self, entry: IotlbEntry) -> None:
        if not 0 < entry.permissions <= ACCESS_READ | ACCESS_WRITE:
            raise ProtocolError(f"a translation with permissions {entry.permissions}")
        if not any(
            region.uva <= entry.uva and entry.uva + entry.size_bytes <= region.uva + region.size_bytes
            for region in self._regions
        ):
            raise ProtocolError(f"a translation to {entry.uva:#x}, which is not in the memory table")
        update = Translation(entry.iova, entry.size_bytes, entry.uva, entry.permissions)
        await self._pool.change_translations(update=[update])

    def _ask_all(self) -> None:
        """Ask the front-end for what vrings wait for, each address once at a time."""
        for index, iova, access in self._pool.waiting():
            if index not in self._asking:
                task = asyncio.create_task(self._ask(index, iova, access))
                self._asking[index] = task
                task.add_done_callback(partial(self._asked, index))

    def ask_again(self) -> None:
        """There is a back-end channel, which there was not, or not one that worked."""
        self._pool.on_waiting()

    def _asked(self, index: int, task: asyncio.Task[bool]) -> None:
        self._asking.pop(index, None)
        # Who could not be asked is not asked anew at once, and for ever.
        if not task.cancelled() and task.result() and self._pool.waiting():
            self._pool.on_waiting()

    async def _ask(self, index: int, iova: int, access: int) -> bool:
        """Whether it was possible to ask, or is by now."""
        channel = self.channel()
        try:
            await self._find(index, iova, access)
        except (Disconnected, TransportError) as error:
            log.warning("the front-end cannot be asked for a translation of %#x: %s", iova, error)
            return self.channel() is not channel
        except ProtocolError as error:
            log.warning("no translation of %#x: %s", iova, error)
        except WorkerError as error:
            log.warning("vring %d goes on waiting for a translation of %#x: %s", index, iova, error)
            return False
        return True

    async def _find(self, index: int, iova: int, access: int) -> None:
        known = self._pool.translation(iova)
        if known and (known.access & access == access or known.access & ACCESS_REFUSED):
            if known.access & ACCESS_REFUSED or self._known.get(index) != iova:
                self._known[index] = iova
                await self._pool.change_translations()  # it came meanwhile; have the vring look again
                return
            # That did not help: the memory that it leads to is gone.
            await self._pool.change_translations(invalidate=[(known.iova, known.size_bytes)])
        self._known.pop(index, None)
        log.debug("vring %d misses %#x for %d", index, iova, access)
        channel = self.channel()
        page = iova & ~(_PAGE - 1)
        code: int | None = 1
        if channel is None:
            log.warning("vring %d lacks a translation of %#x and there is no back-end channel to ask on", index, iova)
        else:
            miss = IotlbEntry(iova, 1, 0, access, IotlbType.MISS)
            code = await channel.request(BackendRequest.IOTLB_MSG, miss.pack())
            if code is None:
                await self._arrival(iova, access)
        known = self._pool.translation(iova)
        if known and known.access & access == access:
            self._fruitless.pop(index, None)
            return
        address, times = self._fruitless.pop(index, (iova, 0))
        if not code and (address != iova or times < _FRUITLESS_MAX):
            # It came, and was invalidated before we looked.
            self._fruitless[index] = (iova, times + 1 if address == iova else 1)
            await self._pool.change_translations()
        else:
            log.warning("vring %d: the front-end has no translation of %#x", index, iova)
            refusal = Translation(page, _PAGE, 0, ACCESS_REFUSED)
            await self._pool.change_translations(update=[refusal])

    async def _arrival(self, iova: int, access: int) -> None:
        """Without REPLY_ACK nothing says that a front-end has nothing: it is given a while."""
        for _ in range(500):
            known = self._pool.translation(iova)
            if known and known.access & access == access:
                return
            await asyncio.sleep(0.01)

    # Dirty-page log.

    async def set_log_base(self, message: Message) -> bytes:
        """SET_LOG_BASE with a file (LOG_SHMFD)."""
        try:
            wanted = LogArea.unpack(message)
            area = await self._connection.area(message, wanted.size_bytes, wanted.offset)
            self._drop_log()
            self._log = area
            await self._apply_log()
        except (ProtocolError, WorkerError, OSError) as error:
            log.warning("SET_LOG_BASE refused: %s", error)
            return pack_u64(1)
        return pack_u64(0)

    async def set_log_event(self, message: Message) -> None:
        """SET_LOG_FD."""
        doorbell = self._connection.log_event(message)
        await self._pool.set_log_event(doorbell.fd if doorbell else -1)

    async def set_logging(self, on: bool) -> None:
        """VHOST_F_LOG_ALL was set or cleared."""
        if on != self._logging:
            self._logging = on
            await self._apply_log()
            log.info("the dirty-page log is %s", "on" if on else "off")

    async def _apply_log(self) -> None:
        if self._log and self._logging:
            await self._pool.set_log(os.dup(self._log.fd), self._log.size_bytes, self._log.offset)
        else:
            await self._pool.set_log(-1, 0, 0)

    def _drop_log(self) -> None:
        if self._log:
            os.close(self._log.fd)
            self._log = None
