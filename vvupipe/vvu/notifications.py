"""BAR 2: doorbells towards the sibling, notification registers for its kicks."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from vvupipe.memory.doorbell import Doorbell
from vvupipe.vfio.function import IoEvent
from vvupipe.vfio.irq_table import IrqTable
from vvupipe.vvu import layout
from vvupipe.vvu.kick_relay import KickRelay


@dataclass(slots=True)
class _Vring:
    vector: int = layout.NO_VECTOR
    kick_fd: int = -1
    route: tuple[int, int] | None = None  # (kick fd, eventfd) that the relay serves now
    call: Doorbell | None = None
    err: Doorbell | None = None


class Notifications:
    """Doorbells, kicks and vectors of every vring. Owns the sibling's eventfds."""

    def __init__(self, max_vhost_queues: int, irqs: IrqTable, relay: KickRelay) -> None:
        self._vrings = [_Vring() for _ in range(max_vhost_queues)]
        self._irqs = irqs
        self._relay = relay
        self._select = 0
        self._log: Doorbell | None = None
        irqs.on_route = self._vector_moved
        #: called with (doorbell number, fd or -1) when the sibling ties one, before the former fd is closed
        self.on_tie: Callable[[int, int], None] = lambda number, fd: None

    # The driver's side: registers.

    def read(self, offset: int, count: int) -> bytes:
        """A read of BAR 2; doorbells read as zero."""
        vector = self._vrings[self._select].vector if self._select < len(self._vrings) else layout.NO_VECTOR
        registers = self._select.to_bytes(2, "little") + vector.to_bytes(2, "little")
        image = bytearray(count)
        for k, value in enumerate(registers, layout.NOTIFICATION_OFFSET - offset):
            if 0 <= k < count:
                image[k] = value
        return bytes(image)

    def write(self, offset: int, data: bytes) -> None:
        """A write to BAR 2: of any size to a doorbell, of 2 or 4 bytes to the notification registers."""
        if offset < layout.DOORBELL_OFFSET + layout.DOORBELL_BYTES:
            self._ring(offset // layout.DOORBELL_MULTIPLIER)
            return
        register = offset - layout.NOTIFICATION_OFFSET
        if register == layout.NOTIFICATION_SELECT and len(data) in {2, 4}:
            self._select = int.from_bytes(data[:2], "little")
            data, register = data[2:], layout.NOTIFICATION_VECTOR
        if register == layout.NOTIFICATION_VECTOR and len(data) == 2 and self._select < len(self._vrings):
            vector = int.from_bytes(data, "little")
            # Like queue_msix_vector: one that does not exist reads back as none.
            self._vrings[self._select].vector = vector if vector < self._irqs.count else layout.NO_VECTOR
            self._route(self._vrings[self._select])

    def _ring(self, number: int) -> None:
        if number == layout.LOG_DOORBELL and self._log:
            self._log.ring()
        is_err = number >= layout.ERR_DOORBELL_BASE
        index = number - layout.ERR_DOORBELL_BASE if is_err else number
        if index < len(self._vrings):
            doorbell = self._vrings[index].err if is_err else self._vrings[index].call
            if doorbell:
                doorbell.ring()

    def io_events(self) -> list[IoEvent]:
        """The sibling's eventfds behind the doorbells that have one."""
        calls = [(index, vring.call) for index, vring in enumerate(self._vrings)]
        errs = [(index, vring.err) for index, vring in enumerate(self._vrings, layout.ERR_DOORBELL_BASE)]
        return [
            IoEvent(layout.DOORBELL_OFFSET + number * layout.DOORBELL_MULTIPLIER, 0, doorbell.fd)
            for number, doorbell in [*calls, *errs, (layout.LOG_DOORBELL, self._log)]
            if doorbell
        ]

    # The sibling's side: eventfds.

    @property
    def count(self) -> int:
        """How many vrings there are."""
        return len(self._vrings)

    def set_kick(self, index: int, fd: int | None) -> None:
        """Take over the kick eventfd of a vring (None: none), non-blocking."""
        vring = self._vrings[index]
        old, vring.kick_fd = vring.kick_fd, -1 if fd is None else fd
        try:
            self._route(vring)
        finally:
            if old >= 0:
                os.close(old)

    def set_call(self, index: int, doorbell: Doorbell | None) -> None:
        """Tie doorbell `index`."""
        old, self._vrings[index].call = self._vrings[index].call, doorbell
        self.on_tie(index, doorbell.fd if doorbell else -1)
        if old:
            old.close()

    def set_err(self, index: int, doorbell: Doorbell | None) -> None:
        """Tie the err doorbell of vring `index`."""
        old, self._vrings[index].err = self._vrings[index].err, doorbell
        self.on_tie(layout.ERR_DOORBELL_BASE + index, doorbell.fd if doorbell else -1)
        if old:
            old.close()

    def set_log(self, doorbell: Doorbell | None) -> None:
        """Tie the doorbell of the dirty-page log."""
        old, self._log = self._log, doorbell
        self.on_tie(layout.LOG_DOORBELL, doorbell.fd if doorbell else -1)
        if old:
            old.close()

    def forget_sibling(self) -> None:
        """Untie doorbells and kicks; the driver's vectors stay."""
        if self._log:
            self.set_log(None)
        for index in range(len(self._vrings)):
            self.set_kick(index, None)
            self.set_call(index, None)
            self.set_err(index, None)

    def forget_driver(self) -> None:
        """The registers as after power-on."""
        self._select = 0
        for vring in self._vrings:
            vring.vector = layout.NO_VECTOR
            self._route(vring)

    def _vector_moved(self, vector: int) -> None:
        for vring in self._vrings:
            if vring.vector == vector:
                self._route(vring)

    def _route(self, vring: _Vring) -> None:
        """Make the relay do what the registers say. A masked vector's kicks wait in the sibling's eventfd."""
        target = self._irqs.target(vring.vector)
        wanted = (vring.kick_fd, target) if vring.kick_fd >= 0 and target >= 0 else None
        if wanted == vring.route:
            return
        if vring.route:
            self._relay.remove(vring.route[0])
            vring.route = None
        if wanted:
            self._relay.add(*wanted)
            vring.route = wanted
