"""Showing a sibling's memory to a VM in QEMU that runs: ivshmem-plain functions, hot-plugged behind root ports.

QEMU opens the memory's file by our /proc/PID/fd, so that it works for any front-end's memfd. A window shows a file from
its start; the size of a BAR is a power of two.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from vvupipe.errors import ProtocolError, TransportError
from vvupipe.vm.qemu_monitor import QemuMonitor, QemuRefused

log = logging.getLogger(__name__)

_LINGER_S = 3.0  # a front-end that reconnects finds its window still there
_DELETED_S = 15.0  # the guest's kernel must agree before a function is gone
_OFFSET_SINCE = (8, 1)  # the QEMU in which memory-backend-file learned `offset`
_PAGE = 4096


@dataclass(frozen=True, slots=True)
class Window:
    """`size_bytes` of a file from `file_offset` on, at the start of BAR 2 of the function behind the port `devfn`."""

    file_offset: int
    size_bytes: int
    devfn: int


@dataclass(slots=True)
class _Port:
    """A root port, free or with one window's function behind it."""

    bus: str
    devfn: int
    device: str | None = None  # QEMU's id of what is behind it


@dataclass(slots=True)
class _Plug:
    """A file that is shown: it stays open as long as QEMU has it."""

    fd: int
    windows: list[Window]
    ports: list[_Port]
    users: int = 0
    expiry: asyncio.TimerHandle | None = None
    identity: tuple[int, int] = field(default=(0, 0))


class MemoryPlugs:
    """The hot-plug ports of one VM. ports: (QEMU's bus id, devfn) of each."""

    def __init__(self, monitor: QemuMonitor, version: tuple[int, int, int], ports: Sequence[tuple[str, int]]) -> None:
        self._monitor = monitor
        self._has_offset = version[:2] >= _OFFSET_SINCE
        self._version = version
        self._ports = [_Port(bus, devfn) for bus, devfn in ports]
        self._plugs: dict[tuple[int, int], _Plug] = {}
        self._deleted: dict[str, asyncio.Event] = {}
        self._late: dict[str, _Port] = {}  # by device: those that the guest has not let go of in time
        self._changing = asyncio.Lock()
        self._counter = 0
        self._leaving: set[asyncio.Task[None]] = set()
        monitor.listeners.append(self._on_event)

    def _on_event(self, name: str, data: dict[str, Any]) -> None:
        device = str(data.get("device"))
        if name == "DEVICE_DELETED" and device in self._deleted:
            self._deleted[device].set()
            if port := self._late.pop(device, None):
                self._start(self._free(device, port))

    async def show(self, fd: int, end: int) -> list[Window]:
        """Have the VM see the first `end` bytes of a file until `hide`. Raises: ProtocolError that says what to do."""
        status = os.fstat(fd)
        identity = (status.st_dev, status.st_ino)
        async with self._changing:
            plug = self._plugs.get(identity)
            if plug is None or sum(window.size_bytes for window in plug.windows) < end:
                if plug is not None:
                    await self._unplug(plug)
                plug = await self._plug(fd, identity, end)
            plug.users += 1
            if plug.expiry:
                plug.expiry.cancel()
                plug.expiry = None
            return plug.windows

    def hide(self, windows: list[Window]) -> None:
        """The memory is not in use any more; it goes after a while."""
        for plug in self._plugs.values():
            if plug.windows is windows:
                plug.users -= 1
                if not plug.users:
                    plug.expiry = asyncio.get_running_loop().call_later(_LINGER_S, self._expire, plug)
                return

    def _expire(self, plug: _Plug) -> None:
        async def leave() -> None:
            async with self._changing:
                if not plug.users and self._plugs.get(plug.identity) is plug:
                    await self._unplug(plug)

        self._start(leave())

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _plug(self, fd: int, identity: tuple[int, int], end: int) -> _Plug:
        parts = self._parts(fd, end)
        free = self._free_ports()
        while len(free) < len(parts) and await self._drop_idle():
            free = self._free_ports()
        if len(free) < len(parts):
            raise ProtocolError(
                f"the device VM has {len(free)} of {len(self._ports)} hot-plug ports free and this memory takes "
                f"{len(parts)}: give the front-end memory of one power of two (-m 1G), or stop another sibling"
            )
        plug = _Plug(os.dup(fd), [], [], identity=identity)
        try:
            for (offset, size), port in zip(parts, free, strict=False):
                await self._add(plug, port, offset, size)
        except BaseException:
            await self._unplug(plug)
            raise
        self._plugs[identity] = plug
        log.info("the VM sees %d MiB of a sibling's memory", sum(size for _, size in parts) >> 20)
        return plug

    def _free_ports(self) -> list[_Port]:
        return [port for port in self._ports if port.device is None]

    def _parts(self, fd: int, end: int) -> list[tuple[int, int]]:
        """(offset, size) of the windows that show the file up to `end`."""
        size = os.fstat(fd).st_size
        whole = 1 << (max(end, _PAGE) - 1).bit_length()
        if whole <= size or _grown(fd, whole):
            return [(0, whole)]
        if not self._has_offset:
            raise ProtocolError(
                f"its memory file of {size >> 20} MiB is sealed and no power of two, which QEMU "
                f"{'.'.join(map(str, self._version))} cannot show: give the front-end a power of two of memory "
                f"(-m {whole >> 20}M), or seal=off to its memory-backend-memfd, or the device VM QEMU 8.1 or newer"
            )
        parts = []
        offset = 0
        end = -(-end // _PAGE) * _PAGE
        while offset < end:
            part = 1 << ((end - offset).bit_length() - 1)
            parts.append((offset, part))
            offset += part
        return parts

    async def _add(self, plug: _Plug, port: _Port, offset: int, size: int) -> None:
        self._counter += 1
        memory, device = f"window-memory{self._counter}", f"window{self._counter}"
        arguments: dict[str, Any] = {
            "qom-type": "memory-backend-file",
            "id": memory,
            "mem-path": f"/proc/{os.getpid()}/fd/{plug.fd}",
            "size": size,
            "share": True,
        }
        if offset:
            arguments["offset"] = offset
        try:
            await self._monitor.execute("object-add", **arguments)
            try:
                await self._monitor.execute(
                    "device_add", driver="ivshmem-plain", memdev=memory, bus=port.bus, id=device
                )
            except QemuRefused:
                await self._monitor.execute("object-del", id=memory)
                raise
        except TransportError as error:
            raise ProtocolError(f"the device VM cannot show the sibling's memory: {error}") from error
        port.device = device
        self._deleted[device] = asyncio.Event()
        plug.ports.append(port)
        plug.windows.append(Window(offset, size, port.devfn))

    async def _drop_idle(self) -> bool:
        """Unplug a file that nobody uses, to make room. False when there is none."""
        for plug in self._plugs.values():
            if not plug.users:
                await self._unplug(plug)
                return True
        return False

    async def _unplug(self, plug: _Plug) -> None:
        if plug.expiry:
            plug.expiry.cancel()
        self._plugs.pop(plug.identity, None)
        for port in plug.ports:
            device = port.device
            assert device is not None
            try:
                await self._monitor.execute("device_del", id=device)
                async with asyncio.timeout(_DELETED_S):
                    await self._deleted[device].wait()
            except TimeoutError:
                # The port stays taken until the guest gets round to it.
                self._late[device] = port
                log.warning("the VM has not let go of a sibling's memory for %.0f s", _DELETED_S)
                continue
            except TransportError as error:
                log.debug("unplugging %s: %s", device, error)
                continue
            await self._free(device, port)
        os.close(plug.fd)

    async def _free(self, device: str, port: _Port) -> None:
        """The guest has let go of a window's function: so does QEMU of the memory."""
        try:
            await self._monitor.execute("object-del", id=device.replace("window", "window-memory"))
        except TransportError as error:
            log.debug("unplugging %s: %s", device, error)
            return
        del self._deleted[device]
        port.device = None

    async def close(self) -> None:
        """Forget everything; QEMU is gone."""
        for plug in self._plugs.values():
            if plug.expiry:
                plug.expiry.cancel()
            os.close(plug.fd)
        self._plugs.clear()
        for task in list(self._leaving):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def _grown(fd: int, size: int) -> bool:
    """Whether a memory file could be made longer: what is added is a hole that nobody looks at."""
    try:
        if os.readlink(f"/proc/self/fd/{fd}").startswith(("/memfd:", "/dev/shm/")):
            os.ftruncate(fd, size)
            return True
    except OSError as error:
        log.debug("a memory file stays as long as it is: %s", error)
    return False
