"""How a VVU function gets into a VM that QEMU runs: by QEMU's vfio-user client, or by its ivshmem-doorbell device."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from pathlib import Path
from typing import Protocol

from vvupipe.errors import TransportError
from vvupipe.ivshmem.server import IvshmemServer, Relay
from vvupipe.unix_path import listen_private
from vvupipe.vfio.user_server import VfioUserServer
from vvupipe.vvu import layout
from vvupipe.vvu.function import VvuFunction

log = logging.getLogger(__name__)


class Carrier(Protocol):
    """One function in one VM."""

    #: which it is, for people
    name: str
    #: vendor:device, as the guest's lspci -n has it
    identity: str

    def arguments(self, address: str) -> list[str]:
        """QEMU's arguments that put the function at `address` ("10.0" on the root bus)."""

    def inherited(self) -> list[int]:
        """File descriptors that QEMU must inherit."""

    async def started(self) -> None:
        """QEMU runs and has inherited them. Raises: TransportError."""

    async def run(self) -> None:
        """Serve until cancelled."""

    def guest_reset(self) -> None:
        """The guest was reset."""

    def close(self) -> None:
        """Let go of everything; the function stays."""


class VfioUserCarrier:
    """QEMU >= 10.1: its vfio-user-pci device is our vfio-user server's client; the guest sees the function itself."""

    name = "vfio-user"
    identity = f"{layout.VENDOR_ID:04x}:{layout.DEVICE_ID:04x}"

    def __init__(self, function: VvuFunction, path: Path) -> None:
        self._path = path
        self._function = function
        # QEMU takes no path that is too long for a socket address; ours is always reachable like this.
        self._folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._server = VfioUserServer(function, listen_private(path))

    def arguments(self, address: str) -> list[str]:
        """See Carrier."""
        device = {
            "driver": "vfio-user-pci",
            "addr": address,
            "socket": {"type": "unix", "path": f"/proc/{os.getpid()}/fd/{self._folder}/{self._path.name}"},
        }
        return ["-device", json.dumps(device)]

    def inherited(self) -> list[int]:
        """See Carrier."""
        return []

    async def started(self) -> None:
        """See Carrier."""

    async def run(self) -> None:
        """See Carrier."""
        await self._server.run()

    def guest_reset(self) -> None:
        """See Carrier."""
        self._function.reset()

    def close(self) -> None:
        """See Carrier."""
        self._path.unlink(missing_ok=True)
        if self._folder >= 0:
            os.close(self._folder)
            self._folder = -1


class IvshmemCarrier:
    """Any QEMU: the guest sees an ivshmem device, in whose shared memory the function's registers and queues are."""

    name = "ivshmem"
    identity = "1af4:1110"

    def __init__(self, function: VvuFunction, relay: Relay, number: int) -> None:
        self._number = number
        doorbells = [*range(function.notifications.count)]
        doorbells += [layout.ERR_DOORBELL_BASE + index for index in doorbells]
        doorbells.append(layout.LOG_DOORBELL)
        self._server = IvshmemServer(function, relay, [_register(doorbell) for doorbell in doorbells])
        function.notifications.on_tie = lambda number, fd: self._server.tie(*_register(number), fd)
        self._function = function
        self._closed = False

    def arguments(self, address: str) -> list[str]:
        """See Carrier."""
        fd = self._server.client_socket.fileno()
        return [
            "-chardev",
            f"socket,id=ivshmem{self._number},fd={fd}",
            "-device",
            f"ivshmem-doorbell,chardev=ivshmem{self._number},vectors={self._server.vectors},addr={address}",
        ]

    def inherited(self) -> list[int]:
        """See Carrier."""
        return [self._server.client_socket.fileno()]

    async def started(self) -> None:
        """See Carrier: QEMU takes the shared memory while it sets the device up, the rest when it has the time."""
        self._server.client_socket.close()
        await asyncio.to_thread(self._server.greet)

    async def run(self) -> None:
        """See Carrier."""
        await self._server.run()

    def guest_reset(self) -> None:
        """See Carrier."""
        self._server.guest_reset()

    def close(self) -> None:
        """See Carrier."""
        if not self._closed:
            self._closed = True
            self._function.reset()
            self._function.notifications.forget_sibling()
            self._function.notifications.on_tie = lambda number, fd: None
            self._function.dma.clear()
            with contextlib.suppress(TransportError, OSError):
                self._server.close()


def _register(doorbell: int) -> tuple[int, int]:
    return layout.BAR_DOORBELL, layout.DOORBELL_OFFSET + doorbell * layout.DOORBELL_MULTIPLIER
