"""The server of an ivshmem-doorbell device (QEMU docs/specs/ivshmem-spec.rst, "Communication with the server").

QEMU is its only client. It hands out the shared memory and every eventfd once; whatever comes and goes afterwards is
relayed to and from these by the kick relay, so that nothing has to be in step with QEMU's main loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from vvupipe.errors import TransportError
from vvupipe.ivshmem import layout
from vvupipe.ivshmem.mailbox import Mailbox
from vvupipe.ivshmem.owner import OwnerWatch
from vvupipe.memory import shared
from vvupipe.memory.doorbell import Doorbell
from vvupipe.memory.mapping import Mapping
from vvupipe.vfio.function import IRQ_MSIX
from vvupipe.vfio.served_function import ServedFunction

log = logging.getLogger(__name__)

_PROTOCOL_VERSION = 0
_MESSAGE = struct.Struct("<q")
_SHARED_MEMORY = -1  # the message that brings its fd
_OWNER_LOOK_S = 0.2


class Relay(Protocol):
    """Signals one eventfd whenever another is (vvu.kick_relay.KickRelay)."""

    def add(self, kick_fd: int, signal_fd: int) -> None:
        """Begin."""

    def settle(self) -> None:
        """Return once everything from before has been signalled."""

    def remove(self, kick_fd: int) -> None:
        """End; both fds may be closed afterwards."""


class IvshmemServer:
    """Serves `function` through shared memory. Give `client_socket` to QEMU's chardev, then `run`.

    events: (region, offset) of each doorbell register of the function.
    """

    def __init__(self, function: ServedFunction, relay: Relay, events: Sequence[tuple[int, int]]) -> None:
        if len(events) > layout.EVENTS_MAX:
            raise ValueError(f"{len(events)} I/O events, the table holds {layout.EVENTS_MAX}")
        self._function = function
        self._relay = relay
        self._irq_count = function.irqs[IRQ_MSIX].count
        self.vectors = layout.VECTOR_FIRST_IRQ + self._irq_count
        self._ours, self.client_socket = socket.socketpair()
        self._memory_fd = shared.create_unnamed(layout.MEMORY_BYTES)
        self._mapping = Mapping(self._memory_fd, layout.MEMORY_BYTES)
        self._events = {place: number for number, place in enumerate(events)}
        self._bells = [_eventfd() for _ in events]
        self._tied = [-1] * len(events)  # the fd that each signals
        self._request = _eventfd()
        self._guest = [_eventfd() for _ in range(self.vectors)]
        self._mailbox = Mailbox(function, self._mapping.view)
        self._owner = OwnerWatch(self._mapping.view)
        self._write_header(events)
        function.dma.map(layout.DMA_OFFSET, layout.DMA_BYTES, self._memory_fd, layout.DMA_OFFSET, writable=True)
        for vector in range(self._irq_count):
            function.irqs[IRQ_MSIX].set_eventfd(vector, os.dup(self._guest[layout.VECTOR_FIRST_IRQ + vector]))

    def _event_peer(self, number: int) -> tuple[int, int]:
        """(peer, vector) of an I/O event; QEMU takes as many vectors of a peer as its device has."""
        return layout.PEER_EVENTS + number // self.vectors, number % self.vectors

    def _write_header(self, events: Sequence[tuple[int, int]]) -> None:
        view = self._mapping.view
        for number, (region, offset) in enumerate(events):
            entry = layout.EVENT_ENTRY.pack(region, offset, *self._event_peer(number))
            start = layout.EVENT_TABLE_OFFSET + number * layout.EVENT_ENTRY.size
            view[start : start + len(entry)] = entry
        header = layout.HEADER.pack(
            layout.MAGIC,
            layout.VERSION,
            layout.MAILBOX_OFFSET,
            layout.OWNER_OFFSET,
            layout.DMA_OFFSET,
            layout.DMA_BYTES,
            self._irq_count,
            len(events),
        )
        view[layout.HEADER_OFFSET : layout.HEADER_OFFSET + len(header)] = header

    def greet(self) -> None:
        """Tell the client everything; it need not read at once. Raises: TransportError when it is gone already."""
        messages: list[tuple[int, int | None]] = [
            (_PROTOCOL_VERSION, None),
            (layout.PEER_GUEST, None),
            (_SHARED_MEMORY, self._memory_fd),
            (layout.PEER_MAILBOX, self._request),
        ]
        messages += [(self._event_peer(number)[0], fd) for number, fd in enumerate(self._bells)]
        messages += [(layout.PEER_GUEST, fd) for fd in self._guest]
        try:
            for value, fd in messages:
                socket.send_fds(self._ours, [_MESSAGE.pack(value)], [] if fd is None else [fd])
        except OSError as error:
            raise TransportError(f"the ivshmem client did not take what it needs: {error.strerror}") from error

    def tie(self, region: int, offset: int, fd: int) -> None:
        """Have the guest's ringing of a doorbell register signal `fd`; -1: nothing. The former fd is still open."""
        number = self._events[region, offset]
        bell, former = self._bells[number], self._tied[number]
        if former >= 0:
            before = _counter(bell)
            self._relay.settle()
            self._relay.remove(bell)
            if _drain(bell) > before:
                Doorbell(former).ring()  # rung meanwhile: the relay may have missed it
        else:
            _drain(bell)
        self._tied[number] = fd
        if fd >= 0:
            self._relay.add(bell, fd)

    async def run(self) -> None:
        """Answer the mailbox and watch the driver's process until cancelled."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._request, self._requested)
        try:
            while True:
                await asyncio.sleep(_OWNER_LOOK_S)
                self._requested()  # a doorbell that QEMU did not pass on must not be waited for for ever
                if self._owner.died():
                    log.info("%s: its driver's process died", self._function.name)
                    self._function.client_left()
        finally:
            loop.remove_reader(self._request)

    def _requested(self) -> None:
        _drain(self._request)
        if self._mailbox.answer():
            os.eventfd_write(self._guest[layout.VECTOR_MAILBOX], 1)

    def guest_reset(self) -> None:
        """The VM was reset: whatever drove the function is gone."""
        self._owner.clear()
        self._function.client_left()

    def close(self) -> None:
        """Let go of everything; the function's DMA memory and interrupts are its owner's to clear first."""
        for number, fd in enumerate(self._tied):
            if fd >= 0:
                self._relay.remove(self._bells[number])
        self._tied = [-1] * len(self._bells)
        self._mailbox.close()
        self._owner.close()
        self._mapping.close()
        while self._bells:
            os.close(self._bells.pop())
        while self._guest:
            os.close(self._guest.pop())
        os.close(self._request)
        os.close(self._memory_fd)
        self._ours.close()
        self.client_socket.close()


def _eventfd() -> int:
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


def _drain(eventfd: int) -> int:
    """Its counter, which is 0 afterwards."""
    try:
        return os.eventfd_read(eventfd)
    except BlockingIOError:
        return 0


def _counter(eventfd: int) -> int:
    """Its counter, which stays (proc(5), fdinfo)."""
    lines = Path(f"/proc/self/fdinfo/{eventfd}").read_text().splitlines()
    return next((int(line.split()[1], 16) for line in lines if line.startswith("eventfd-count:")), 0)
