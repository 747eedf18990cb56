"""A function's interrupts of one kind: which eventfd each signals, which are masked, which wait for their unmasking."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

_ONE = (1).to_bytes(8, "little")


@dataclass(slots=True)
class _Irq:
    fd: int = -1
    masked: bool = False
    pending: bool = False


class IrqTable:
    """`count` interrupts. Owns the eventfds that it was given.

    `on_route(number)` is called after the eventfd or the mask of an interrupt changed and before an old eventfd is
    closed, so that whoever signals it without us can switch over. `on_pending(number, pending)` tells of pending bits.
    """

    def __init__(self, count: int) -> None:
        self._irqs = [_Irq() for _ in range(count)]
        self.on_route: Callable[[int], None] = lambda number: None
        self.on_pending: Callable[[int, bool], None] = lambda number, pending: None

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._irqs)

    def set_eventfd(self, number: int, fd: int) -> None:
        """Take over `fd` (-1: none) for an interrupt."""
        irq = self._irqs[number]
        old, irq.fd = irq.fd, fd
        try:
            self.on_route(number)
        finally:
            if old >= 0:
                os.close(old)
        if irq.pending and not irq.masked:
            self._deliver(number)

    def disable(self) -> None:
        """Untie all, unmask all, forget what was pending."""
        for number, irq in enumerate(self._irqs):
            irq.masked = False
            self._set_pending(number, False)
            self.set_eventfd(number, -1)

    def set_mask(self, number: int, masked: bool) -> None:
        """Mask or unmask; what was raised meanwhile is signalled at the unmasking."""
        irq = self._irqs[number]
        if irq.masked != masked:
            irq.masked = masked
            self.on_route(number)
        if irq.pending and not masked:
            self._deliver(number)

    def signal(self, number: int) -> None:
        """Raise an interrupt; one that does not exist is dropped, as NO_VECTOR is."""
        if number >= len(self._irqs):
            return
        if self._irqs[number].masked:
            self._set_pending(number, True)
        else:
            self._deliver(number)

    def target(self, number: int) -> int:
        """The eventfd that signals this interrupt right now; -1 when it is masked, untied or does not exist."""
        if number >= len(self._irqs) or self._irqs[number].masked:
            return -1
        return self._irqs[number].fd

    def _deliver(self, number: int) -> None:
        self._set_pending(number, False)
        fd = self._irqs[number].fd
        if fd >= 0:
            try:
                os.write(fd, _ONE)
            except BlockingIOError:
                return  # a full counter wakes its reader already

    def _set_pending(self, number: int, pending: bool) -> None:
        irq = self._irqs[number]
        if irq.pending != pending:
            irq.pending = pending
            self.on_pending(number, pending)
