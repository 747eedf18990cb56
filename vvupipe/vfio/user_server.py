"""The server's side of vfio-user: one function on one socket, one client at a time.

A malformed request gets an error reply; only bytes that are no vfio-user message end the connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import select
import socket
from collections.abc import Callable
from typing import Any

from vvupipe.errors import ProtocolError
from vvupipe.fd_socket import FdSocket, accept, close_all, dup_all
from vvupipe.vfio import user_messages as wire
from vvupipe.vfio.dma_space import ADDRESS_END
from vvupipe.vfio.function import NUM_IRQS, NUM_REGIONS
from vvupipe.vfio.irq_table import IrqTable
from vvupipe.vfio.region_info import pack_io_events, pack_region
from vvupipe.vfio.served_function import ServedFunction
from vvupipe.vfio.user_messages import Command, Header

log = logging.getLogger(__name__)

_LEAVING_S = 1.0  # how long the clean-up after a client that hung up may take
_FIRST_MESSAGE_S = 5.0  # whoever is turned away has this long to say VERSION
_OWN_CAPABILITIES = {
    "max_msg_fds": wire.MESSAGE_FDS_MAX,
    "max_data_xfer_size": wire.DATA_TRANSFER_MAX,
    "write_multiple": True,
}

Answer = tuple[bytes, list[int]]  # payload and fds, which stay the function's


class VfioUserServer:
    """Serves `function` to whoever connects to the listening socket `sock`, which it owns."""

    def __init__(self, function: ServedFunction, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._function = function
        self._listening = sock
        self._client: _Client | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._failed: asyncio.Future[None] | None = None

    @property
    def client_pid(self) -> int | None:
        """Process id of the client that has the function."""
        return self._client.pid if self._client else None

    async def run(self) -> None:
        """Serve until cancelled. Raises: what the function raised that is no client's fault, as WorkerError."""
        accepting = asyncio.create_task(self._accept())
        self._failed = asyncio.get_running_loop().create_future()
        try:
            await asyncio.wait({accepting, self._failed}, return_when=asyncio.FIRST_COMPLETED)
            for ended in (self._failed, accepting):
                if ended.done():
                    ended.result()
        finally:
            accepting.cancel()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._listening.close()

    async def _accept(self) -> None:
        while True:
            sock = await accept(self._listening, f"{self._function.name}: a client")
            task = asyncio.create_task(self._serve(FdSocket(sock)))
            self._tasks.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error and self._failed and not self._failed.done():
            self._failed.set_exception(error)

    async def _serve(self, sock: FdSocket) -> None:
        try:
            if self._client and self._client.hung_up:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._client.gone.wait(), _LEAVING_S)
            if self._client:
                await asyncio.wait_for(_turn_away(sock, self._client.pid), _FIRST_MESSAGE_S)
                return
            self._client = client = _Client(self._function, sock)
            log.info("%s: driven by process %d", self._function.name, client.pid)
            try:
                await client.run()
            finally:
                client.close()
                self._client = None
                log.info("%s: process %d let go of it", self._function.name, client.pid)
        except (ProtocolError, OSError) as error:
            log.warning("%s: client dropped: %s", self._function.name, error)
        finally:
            sock.close()


async def _receive(sock: FdSocket) -> tuple[Header, bytes, list[int]] | None:
    start = await sock.receive_exactly(wire.HEADER.size)
    if start is None:
        return None
    head, fds = start
    try:
        header = Header.unpack(head)
        payload = b""
        if header.size_bytes > wire.HEADER.size:
            rest = await sock.receive_exactly(header.size_bytes - wire.HEADER.size)
            if rest is None:
                raise ProtocolError("a vfio-user header without its message")
            payload = rest[0]
            fds += rest[1]
    except BaseException:
        close_all(fds)
        raise
    return header, payload, fds


async def _turn_away(sock: FdSocket, holder_pid: int) -> None:
    message = await _receive(sock)
    if message is None:
        return
    header, payload, fds = message
    close_all(fds)
    capabilities = wire.unpack_version(payload)[2] if header.command == Command.VERSION else {}
    extra = wire.BUSY_REPLY.pack(holder_pid) if wire.our_extensions(capabilities) else b""
    await sock.send(wire.pack_error(header, errno.EBUSY, extra))


class _Client:
    """One client's stay."""

    def __init__(self, function: ServedFunction, sock: FdSocket) -> None:
        self._function = function
        self._sock = sock
        self._version_done = False
        self._extensions: frozenset[str] = frozenset()
        self._fds_max = 1
        self._transfer_max = wire.DATA_TRANSFER_MAX
        self.pid = sock.peer_pid
        self.gone = asyncio.Event()
        self._handlers: dict[int, Callable[[bytes, list[int]], Answer]] = {
            Command.VERSION: self._version,
            Command.DMA_MAP: self._dma_map,
            Command.DMA_UNMAP: self._dma_unmap,
            Command.DEVICE_GET_INFO: self._device_info,
            Command.DEVICE_GET_REGION_INFO: self._region_info,
            Command.DEVICE_GET_REGION_IO_FDS: self._region_io_fds,
            Command.DEVICE_GET_IRQ_INFO: self._irq_info,
            Command.DEVICE_SET_IRQS: self._set_irqs,
            Command.REGION_READ: self._region_read,
            Command.REGION_WRITE: self._region_write,
            Command.DEVICE_RESET: self._reset,
            Command.REGION_WRITE_MULTI: self._write_multi,
        }

    @property
    def hung_up(self) -> bool:
        """Whether the peer closed its end, even if we did not come to see it yet."""
        poll = select.poll()
        poll.register(self._sock.fileno(), select.POLLRDHUP)
        return bool(poll.poll(0))

    async def run(self) -> None:
        """Answer until the client leaves. Raises: ProtocolError."""
        while (message := await _receive(self._sock)) is not None:
            header, payload, fds = message
            reply_fds: list[int] = []
            try:
                reply, reply_fds = self._answer(header, payload, fds)
                if not header.flags & wire.FLAG_NO_REPLY:
                    await self._sock.send(reply, reply_fds)
            finally:
                close_all(fds)
                close_all(reply_fds)

    def close(self) -> None:
        """What the client brought goes with it."""
        self._function.client_left()
        self._function.dma.clear()
        for table in self._function.irqs.values():
            table.disable()
        self.gone.set()

    def _answer(self, header: Header, payload: bytes, fds: list[int]) -> Answer:
        """The reply; its fds are the caller's."""
        try:
            if header.is_reply:
                raise ProtocolError("a reply to no command of ours")
            if not self._version_done and header.command != Command.VERSION:
                raise ProtocolError("the first message must be VERSION")
            handler = self._handlers.get(header.command)
            if handler is None:
                # Migration, DEVICE_FEATURE, twin sockets: nothing of that is offered.
                raise OSError(errno.EOPNOTSUPP, "not offered")
            body, reply_fds = handler(payload, fds)
            # The function's own may be closed, and others have their numbers, before a slow client has room.
            reply_fds = dup_all(reply_fds)
        except ProtocolError as error:
            log.warning("%s: command %d refused: %s", self._function.name, header.command, error)
            return wire.pack_error(header, errno.EINVAL), []
        except OSError as error:
            log.debug("%s: command %d failed: %s", self._function.name, header.command, error)
            return wire.pack_error(header, error.errno or errno.EIO), []
        return wire.pack_reply(header, body), reply_fds

    def _version(self, payload: bytes, fds: list[int]) -> Answer:
        if self._version_done:
            raise ProtocolError("a second VERSION")
        major, minor, capabilities = wire.unpack_version(payload)
        if major != wire.VERSION_MAJOR:
            raise OSError(errno.EINVAL, f"version {major} is not ours")
        self._fds_max = min(wire.capability_number(capabilities, "max_msg_fds", 1), wire.MESSAGE_FDS_MAX)
        self._transfer_max = min(
            wire.capability_number(capabilities, "max_data_xfer_size", wire.DATA_TRANSFER_MAX), wire.DATA_TRANSFER_MAX
        )
        self._extensions = wire.our_extensions(capabilities)
        own: dict[str, Any] = dict(_OWN_CAPABILITIES)
        if not self._extensions:
            own["max_msg_fds"] = self._fds_max  # QEMU 10 and 11 take no more than they offered
        if self._extensions:
            own[wire.EXTENSION] = dict.fromkeys(sorted(self._extensions), True)
        self._version_done = True
        # "The server's reply": its own version, unless the client's is lower.
        return wire.pack_version(own, min(minor, wire.VERSION_MINOR)), []

    def _dma_map(self, payload: bytes, fds: list[int]) -> Answer:
        _, flags, offset, iova, size = _fields(wire.DMA_MAP, payload)
        if len(fds) > 1:
            raise ProtocolError("more than one file descriptor for a DMA mapping")
        writable = bool(flags & wire.DMA_WRITABLE)
        self._function.dma.map(iova, size, fds[0] if fds else None, offset, writable=writable)
        return b"", []

    def _dma_unmap(self, payload: bytes, fds: list[int]) -> Answer:
        _, flags, iova, size = _fields(wire.DMA_UNMAP, payload)
        if flags & wire.DMA_UNMAP_ALL:
            if iova or size:
                raise OSError(errno.EINVAL, "all, and a range")
            size = ADDRESS_END
        self._function.dma.check_unmap(iova, size)  # what is refused takes nothing away
        self._function.before_unmap(iova, size)
        self._function.dma.unmap(iova, size)
        return payload[: wire.DMA_UNMAP.size], []

    def _device_info(self, payload: bytes, fds: list[int]) -> Answer:
        _fields(wire.DEVICE_INFO, payload)
        flags = wire.DEVICE_FLAGS_PCI | wire.DEVICE_FLAGS_RESET
        return wire.DEVICE_INFO.pack(wire.DEVICE_INFO.size, flags, NUM_REGIONS, NUM_IRQS), []

    def _region_info(self, payload: bytes, fds: list[int]) -> Answer:
        argsz, _, index, *_ = _fields(wire.REGION_INFO, payload)
        if index >= NUM_REGIONS:
            raise OSError(errno.EINVAL, f"region {index} does not exist")
        with_areas = wire.EXTENSION_AREA_FDS in self._extensions
        return pack_region(index, self._function.region(index), argsz, self._fds_max if with_areas else 0)

    def _region_io_fds(self, payload: bytes, fds: list[int]) -> Answer:
        argsz, flags, index, _ = _fields(wire.REGION_IO_FDS, payload)
        if flags or index >= NUM_REGIONS:
            raise OSError(errno.EINVAL, f"region {index} does not exist")
        if wire.EXTENSION_DOORBELL_FDS not in self._extensions:
            # The eventfds come and go with the sibling, which the plain protocol has no way to tell.
            raise OSError(errno.EOPNOTSUPP, "optional, and only with our extension")
        return pack_io_events(index, self._function.io_events(index), argsz, self._fds_max)

    def _irq_info(self, payload: bytes, fds: list[int]) -> Answer:
        _, _, index, _ = _fields(wire.IRQ_INFO, payload)
        if index >= NUM_IRQS:
            raise OSError(errno.EINVAL, f"interrupts of kind {index} do not exist")
        table = self._function.irqs.get(index)
        flags = wire.IRQ_EVENTFD | wire.IRQ_MASKABLE if table else 0
        return wire.IRQ_INFO.pack(wire.IRQ_INFO.size, flags, index, table.count if table else 0), []

    def _set_irqs(self, payload: bytes, fds: list[int]) -> Answer:
        if len(payload) < wire.IRQ_SET.size:
            raise ProtocolError("SET_IRQS is too short")
        _, flags, index, start, count = wire.IRQ_SET.unpack_from(payload)
        data, action = flags & wire.IRQ_DATA_MASK, flags & wire.IRQ_ACTION_MASK
        table = self._function.irqs.get(index)
        if table is None:
            if index >= NUM_IRQS or count:
                raise OSError(errno.EINVAL, f"interrupts of kind {index} do not exist")
            return b"", []
        if start + count > table.count:
            raise OSError(errno.EINVAL, "interrupts beyond the last")
        if data == wire.IRQ_DATA_EVENTFD:
            self._tie_irqs(table, action, start, count, fds)
            return b"", []
        numbers = list(range(start, start + count))
        if data == wire.IRQ_DATA_BOOL:
            chosen = payload[wire.IRQ_SET.size :]
            if len(chosen) < count:
                raise ProtocolError("fewer booleans than interrupts")
            numbers = [number for number, wanted in zip(numbers, chosen, strict=False) if wanted]
        elif data != wire.IRQ_DATA_NONE:
            raise ProtocolError(f"SET_IRQS with data flags {data:#x}")
        if action == wire.IRQ_ACTION_TRIGGER and data == wire.IRQ_DATA_NONE and not count:
            table.disable()
            return b"", []
        for number in numbers:
            if action == wire.IRQ_ACTION_TRIGGER:
                table.signal(number)
            elif action in {wire.IRQ_ACTION_MASK_IRQ, wire.IRQ_ACTION_UNMASK}:
                table.set_mask(number, action == wire.IRQ_ACTION_MASK_IRQ)
            else:
                raise ProtocolError(f"SET_IRQS with action flags {action:#x}")
        return b"", []

    @staticmethod
    def _tie_irqs(table: IrqTable, action: int, start: int, count: int, fds: list[int]) -> None:
        if action != wire.IRQ_ACTION_TRIGGER:
            raise OSError(errno.EINVAL, "masks of MSI-X have no eventfd")
        if fds and len(fds) != count:
            raise ProtocolError(f"{len(fds)} eventfds for {count} interrupts")
        for fd in fds:
            if not is_eventfd(fd):
                raise OSError(errno.EINVAL, "an interrupt needs an eventfd")
            # Whoever signals it must never be made to wait by whoever reads it.
            os.set_blocking(fd, False)
        for number in range(start, start + count):
            table.set_eventfd(number, fds.pop(0) if fds else -1)

    def _access(self, offset: int, region: int, count: int) -> None:
        if region >= NUM_REGIONS or offset + count > self._function.region(region).size_bytes:
            raise OSError(errno.EINVAL, f"{count} bytes at {offset:#x} of region {region} do not exist")

    def _region_read(self, payload: bytes, fds: list[int]) -> Answer:
        offset, region, count = _fields(wire.REGION_ACCESS, payload)
        if count > self._transfer_max:
            raise OSError(errno.EINVAL, f"{count} bytes are more than was agreed")
        self._access(offset, region, count)
        return wire.REGION_ACCESS.pack(offset, region, count) + self._function.read(region, offset, count), []

    def _region_write(self, payload: bytes, fds: list[int]) -> Answer:
        if len(payload) < wire.REGION_ACCESS.size:
            raise ProtocolError("REGION_WRITE is too short")
        offset, region, count = wire.REGION_ACCESS.unpack_from(payload)
        data = payload[wire.REGION_ACCESS.size :]
        if len(data) != count:
            raise ProtocolError(f"REGION_WRITE of {count} bytes brings {len(data)}")
        self._access(offset, region, count)
        self._function.write(region, offset, data)
        return wire.REGION_ACCESS.pack(offset, region, count), []

    def _write_multi(self, payload: bytes, fds: list[int]) -> Answer:
        if len(payload) < wire.MULTI_HEAD.size:
            raise ProtocolError("REGION_WRITE_MULTI is too short")
        (count,) = wire.MULTI_HEAD.unpack_from(payload)
        body = payload[wire.MULTI_HEAD.size :]
        if len(body) != count * wire.MULTI_WRITE.size:
            raise ProtocolError(f"REGION_WRITE_MULTI of {count} writes in {len(body)} bytes")
        for offset, region, size, data in wire.MULTI_WRITE.iter_unpack(body):
            if size > len(data):
                raise OSError(errno.EINVAL, "a single write takes at most 8 bytes")
            self._access(offset, region, size)
            self._function.write(region, offset, data[:size])
        return wire.MULTI_HEAD.pack(count), []

    def _reset(self, payload: bytes, fds: list[int]) -> Answer:
        self._function.reset()
        return b"", []


def _fields(layout: Any, payload: bytes) -> tuple[int, ...]:
    # A later version may append fields; what is missing is an error.
    if len(payload) < layout.size:
        raise ProtocolError(f"{len(payload)} bytes where {layout.size} are due")
    fields: tuple[int, ...] = layout.unpack_from(payload)
    return fields


def is_eventfd(fd: int) -> bool:
    """Whether `fd` is an eventfd; True where /proc cannot say."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}").startswith("anon_inode:[eventfd")
    except OSError:
        return True
