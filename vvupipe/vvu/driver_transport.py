"""vhost-user over a VVU function: messages off the rxq, memory from BAR 4, doorbells from BAR 2."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable

from vvupipe.errors import Disconnected, ProtocolError, TransportError
from vvupipe.memory.doorbell import Doorbell
from vvupipe.memory.region import MemoryRegion, close_regions
from vvupipe.vfio.function import MappableArea
from vvupipe.vhost_user.messages import Message, unpack
from vvupipe.vhost_user.payloads import (
    VRING_INDEX_MASK,
    VRING_NO_FD,
    RegionEntry,
    unpack_memory_table,
    unpack_single_region,
    unpack_u64,
)
from vvupipe.vhost_user.transport import FileArea
from vvupipe.vvu import layout
from vvupipe.vvu.driver import VvuDriver

log = logging.getLogger(__name__)

_EVENTFD_BYTES = 8


class VvuTransport:
    """Implements transport.Transport on a started driver, which it owns.

    One front-end at a time, as the function; one task receives, any may send.
    """

    def __init__(self, driver: VvuDriver, on_close: Callable[[], None] | None = None) -> None:
        """on_close: called once the function was let go."""
        self.driver: VvuDriver | None = driver
        self._on_close = on_close
        self._name = driver.function.name
        #: the zero-length message of the former front-end is still to come
        self.end_due = False
        self._held: int | None = None  # rx buffer of the message that is being dealt with
        self._waiting: dict[int, set[asyncio.Future[int]]] = {}  # by the fd that is watched

    async def accept(self) -> VvuConnection:
        """See transport.Transport: the first message tells that a front-end is there."""
        while True:
            message = await self.next_message()
            if self.end_due:
                self.end_due = bool(message)
            elif message:
                self.end_due = True
                return VvuConnection(self, message)

    async def next_message(self) -> bytes:
        """The next message's bytes, none of them at the end of a front-end.

        Asking for it tells the function that the one before was dealt with. Raises: TransportError.
        """
        driver = self._running()
        if self._held is not None:
            held, self._held = self._held, None
            driver.give_back(held)
        while True:
            # The counter is emptied before the queue is looked at: what comes after that counts again.
            _drain(driver.rx_eventfd)
            taken = driver.take_message()
            if taken is not None:
                data, self._held = taken
                return data
            await self._wait(driver.rx_eventfd)

    async def send(self, message: Message) -> None:
        """Put a message on the txq, when there is room. Raises: TransportError."""
        driver = self._running()
        data = message.pack()
        while True:
            _drain(driver.tx_eventfd)
            if driver.put_message(data):
                return
            await self._wait(driver.tx_eventfd)

    def drop_front_end(self) -> None:
        """Have the function disconnect the present front-end; what it still says is skipped."""
        driver = self._running()
        driver.set_backend_up(False)
        driver.set_backend_up(True)

    def _running(self) -> VvuDriver:
        if self.driver is None:
            raise TransportError(f"function {self._name} was let go")
        return self.driver

    async def _wait(self, eventfd: int) -> None:
        """Wait for an interrupt. Raises: TransportError when the function is gone or has failed."""
        driver = self._running()
        loop = asyncio.get_running_loop()
        woken: asyncio.Future[int] = loop.create_future()
        watched = [fd for fd in (eventfd, driver.config_eventfd, driver.function.hangup_fd) if fd >= 0]
        for fd in watched:
            # A loop has one reader for an fd, and several tasks may wait for this one.
            if fd not in self._waiting:
                loop.add_reader(fd, self._wake, fd)
            self._waiting.setdefault(fd, set()).add(woken)
        try:
            fd = await woken
        finally:
            for other in watched:
                self._waiting[other].discard(woken)
                if not self._waiting[other]:
                    del self._waiting[other]
                    loop.remove_reader(other)
        if fd == driver.function.hangup_fd:
            raise TransportError(f"function {self._name} is gone: its VM ended")
        if fd == driver.config_eventfd:
            _drain(fd)
            driver.check()

    def _wake(self, fd: int) -> None:
        for woken in self._waiting[fd]:
            if not woken.done():
                woken.set_result(fd)

    def close(self) -> None:
        """See transport.Transport: the function is reset, so its sibling sees a disconnect."""
        if self.driver:
            self.driver.close()
            self.driver = None
            if self._on_close:
                self._on_close()

    def describe(self) -> str:
        """See transport.Transport."""
        return f"VVU function {self._name}"


def _drain(eventfd: int) -> None:
    try:
        os.read(eventfd, _EVENTFD_BYTES)
    except BlockingIOError:
        return  # it was empty


class VvuConnection:
    """Implements transport.Connection: memory and doorbells are asked of the function, nothing comes with a message."""

    protocol_features = layout.CARRIED

    def __init__(self, transport: VvuTransport, first: bytes) -> None:
        self._transport = transport
        self._first: bytes | None = first
        self._ended = False
        self._channel: VvuBackEndChannel | None = None

    def _driver(self) -> VvuDriver:
        if self._transport.driver is None:
            raise TransportError(f"{self._transport.describe()} was let go")
        return self._transport.driver

    async def receive(self) -> Message | None:
        """See transport.Connection."""
        while not self._ended:
            data, self._first = self._first, None
            if data is None:
                data = await self._transport.next_message()
            if not data:
                self._ended = True
                self._transport.end_due = False
                if self._channel:
                    self._channel.replies.put_nowait(None)
                break
            message = unpack(data)
            # What is a reply answers a request of ours: the front-end's own requests never are.
            if not message.is_reply:
                return message
            if self._channel:
                self._channel.replies.put_nowait(message)
        return None

    async def send(self, message: Message) -> None:
        """See transport.Connection."""
        if self._ended:
            raise Disconnected("the front-end has gone")
        await self._transport.send(message)

    async def memory_regions(self, message: Message) -> list[MemoryRegion]:
        """See transport.Connection: region after region, in the order of the message, from BAR offset 0 on."""
        entries = unpack_memory_table(message)
        areas = await self._driver().shared_memory_areas()
        regions: list[MemoryRegion] = []
        try:
            offset = 0
            for entry in entries:
                regions += _regions_at(offset, entry, areas)
                offset += entry.size_bytes
        except BaseException:
            close_regions(regions)
            raise
        finally:
            for area in areas:
                area.close()
        return regions

    async def added_region(self, message: Message) -> list[MemoryRegion]:
        """See transport.Connection; the function says in the mmap offset where in the BAR it is."""
        entry = unpack_single_region(message)
        areas = await self._driver().shared_memory_areas()
        try:
            return _regions_at(entry.mmap_offset, entry, areas)
        finally:
            for area in areas:
                area.close()

    async def area(self, message: Message, size_bytes: int, offset: int) -> FileArea:
        """See transport.Connection; the function says in the offset where in the BAR it is."""
        areas = await self._driver().shared_memory_areas()
        entry = RegionEntry(0, size_bytes, 0, offset)
        try:
            parts = _regions_at(offset, entry, areas)
        finally:
            for area in areas:
                area.close()
        if len(parts) != 1:
            close_regions(parts)
            raise ProtocolError(f"{message.name}: its memory does not lie in one piece")
        return FileArea(parts[0].fd, size_bytes, parts[0].fd_offset)

    def attach_area(self, reply: Message, size_bytes: int) -> None:
        """See transport.Connection: the function does, as no file can be sent through it."""

    def kick(self, message: Message) -> int | None:
        """See transport.Connection."""
        value = unpack_u64(message)
        if value & VRING_NO_FD:
            return None
        return self._driver().kick_eventfd(value & VRING_INDEX_MASK)

    def call(self, message: Message) -> Doorbell | None:
        """See transport.Connection."""
        return self._doorbell(message, err=False)

    def err(self, message: Message) -> Doorbell | None:
        """See transport.Connection."""
        return self._doorbell(message, err=True)

    def _doorbell(self, message: Message, *, err: bool) -> Doorbell | None:
        value = unpack_u64(message)
        if value & VRING_NO_FD:
            return None
        return self._driver().doorbell(value & VRING_INDEX_MASK, err=err)

    def log_event(self, message: Message) -> Doorbell | None:
        """See transport.Connection."""
        return self._driver().log_doorbell()

    def back_end_channel(self, message: Message) -> VvuBackEndChannel:
        """See transport.Connection: requests go by the txq, replies come by the rxq."""
        self._channel = VvuBackEndChannel(self)
        return self._channel

    def close(self) -> None:
        """See transport.Connection."""
        if not self._ended:
            self._ended = True
            try:
                self._transport.drop_front_end()
            except TransportError as error:
                log.debug("nobody to disconnect: %s", error)


class VvuBackEndChannel:
    """Implements transport.MessageChannel on the connection's own queues."""

    def __init__(self, connection: VvuConnection) -> None:
        self._connection = connection
        self.replies: asyncio.Queue[Message | None] = asyncio.Queue()

    async def receive(self) -> Message | None:
        """See transport.MessageChannel."""
        return await self.replies.get()

    async def send(self, message: Message) -> None:
        """See transport.MessageChannel."""
        await self._connection.send(message)

    def close(self) -> None:
        """See transport.MessageChannel: it ends with the connection."""


def _regions_at(offset: int, entry: RegionEntry, areas: list[MappableArea]) -> list[MemoryRegion]:
    """The region at `offset` of the shared-memory BAR, in as many parts as it has areas."""
    found: list[MemoryRegion] = []
    done = 0
    for area in sorted(areas, key=lambda area: area.offset):
        start = offset + done - area.offset
        if start < 0 or start >= area.size_bytes or done == entry.size_bytes:
            continue
        size = min(entry.size_bytes - done, area.size_bytes - start)
        try:
            fd = os.dup(area.fd)
        except OSError:
            close_regions(found)
            raise
        found.append(MemoryRegion(entry.gpa + done, size, entry.uva + done, fd, area.fd_offset + start))
        done += size
    if done < entry.size_bytes:
        close_regions(found)
        raise ProtocolError(f"{entry.size_bytes:#x} bytes at {offset:#x} of the shared-memory BAR cannot be mapped")
    return found
