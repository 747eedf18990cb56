"""QEMU's QMP monitor: start the VM, change it, learn how it ended (QEMU docs/interop/qmp-spec.rst)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from typing import Any

from qemu.qmp import EventListener, ExecuteError, QMPClient, QMPError
from qemu.qmp.message import Message
from qemu.qmp.protocol import ConnectError, Runstate

from vvupipe.errors import TransportError

_log = logging.getLogger(__name__)

_DRAIN_S = 5.0  # how long the last events may take to arrive once QEMU itself has ended


class QemuRefused(TransportError):
    """QEMU answered a command with an error."""


class QemuMonitor:
    """The QMP session of one QEMU over a connected socket.

    started: whether the guest was let run. shutdown_reason: QEMU's word for it (ShutdownCause: "guest-shutdown",
    "guest-reset", ...) once the VM has ended.
    panicked: whether the guest reported a panic. listeners: called with the name and the data of each event.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        # The library logs as errors what we handle: a QEMU that ended.
        logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)
        self._client = QMPClient("vvupipe")
        self._events = EventListener(names=["SHUTDOWN", "GUEST_PANICKED", "RESET", "DEVICE_DELETED"])
        self._client.register_listener(self._events)
        self.started = False
        self.shutdown_reason: str | None = None
        self.panicked = False
        self.listeners: list[Callable[[str, dict[str, Any]], None]] = []

    async def start(self) -> bool:
        """Open the session and let the paused VM run; False when QEMU ended before it could.

        It takes as long as QEMU needs to set up its devices, which includes the answers of their back-ends.
        """
        try:
            await self._client.connect(self._socket)
            await self._client.execute("cont")
        except (ConnectError, QMPError, OSError, EOFError) as error:
            _log.debug("no QMP session: %s", error)
            return False
        self.started = True
        return True

    async def follow(self) -> None:
        """Note every event as it comes, until cancelled."""
        async for event in self._events:
            self._note(event)

    def _note(self, event: Message) -> None:
        found = event.get("data")
        data: dict[str, Any] = found if isinstance(found, dict) else {}
        _log.debug("QEMU event %s %s", event["event"], data)
        match event["event"]:
            case "SHUTDOWN":
                self.shutdown_reason = data["reason"]
            case "GUEST_PANICKED":
                self.panicked = True
            case "RESET":
                _log.info("the guest was reset (%s)", data.get("reason", "no reason given"))
        for listener in self.listeners:
            listener(str(event["event"]), data)

    async def execute(self, command: str, **arguments: Any) -> Any:
        """A command's answer. Raises: QemuRefused with QEMU's own words, TransportError when QEMU is gone."""
        try:
            return await self._client.execute(command, arguments)
        except ExecuteError as error:
            raise QemuRefused(f"QEMU refused {command}: {error}") from error
        except (QMPError, OSError, EOFError) as error:
            raise TransportError(f"QEMU does not answer {command}: {error}") from error

    async def quit(self) -> None:
        """Ask QEMU to end now; harmless when it has ended or does not listen."""
        if self._client.runstate != Runstate.RUNNING:
            return
        try:
            await self._client.execute("quit")
        except (QMPError, OSError, EOFError) as error:
            _log.debug("QMP quit: %s", error)

    async def close(self) -> None:
        """End the session. When QEMU has ended, the events that it left behind are noted first."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_S):
                while self._client.runstate == Runstate.RUNNING:
                    await self._client.runstate_changed()
        try:
            await self._client.disconnect()
        except (QMPError, OSError, EOFError) as error:
            _log.debug("end of the QMP session: %s", error)
        for event in self._events.clear():
            self._note(event)
        self._socket.close()
