"""The function that an ivshmem-doorbell device carries, as its driver in the guest sees it."""

from __future__ import annotations

import logging
import os
import select
import time
from collections.abc import Sequence

from vvupipe.errors import TransportError, UserError
from vvupipe.ivshmem import layout
from vvupipe.ivshmem.owner import Ownership
from vvupipe.memory.mapping import Mapping
from vvupipe.pci.config_space import COMMAND, COMMAND_MASTER, COMMAND_MEMORY
from vvupipe.vfio.function import IRQ_MSIX, REGION_CONFIG, MappableArea, VfioFunction

log = logging.getLogger(__name__)

_ANSWER_S = 10.0
_LOOK_MS = 20  # between two looks at the mailbox when no interrupt comes
_EVENTFD_BYTES = 8


class IvshmemDma:
    """The DMA area as memory for rings and buffers: implements vvu.driver.DmaBuffer."""

    def __init__(self, area: MappableArea, memory: memoryview, offset: int, size_bytes: int) -> None:
        self.fd = os.dup(area.fd)
        self.fd_offset = area.fd_offset + offset
        self.gpa = offset
        self.size_bytes = size_bytes
        self.view = memory[offset : offset + size_bytes]

    def close(self) -> None:
        """Let go of it; harmless when called again."""
        if self.fd >= 0:
            self.view.release()
            os.close(self.fd)
            self.fd = -1


class IvshmemFunction(VfioFunction):
    """Implements VfioFunction by the mailbox of `device`, the ivshmem function itself, which it owns.

    Raises: UserError when the shared memory has not our header, TransportError when it does not behave.
    """

    def __init__(self, device: VfioFunction) -> None:
        self._device = device
        self.name = device.name
        self.hangup_fd = device.hangup_fd
        self._irqs: list[int] = []
        self._mail = -1
        self._owner: Ownership | None = None
        self._mapping: Mapping | None = None
        self._area: MappableArea | None = None
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        command = int.from_bytes(self._device.read(REGION_CONFIG, COMMAND, 2), "little")
        self._device.write(REGION_CONFIG, COMMAND, (command | COMMAND_MEMORY | COMMAND_MASTER).to_bytes(2, "little"))
        areas = self._device.mappable_areas(layout.BAR_MEMORY)
        if len(areas) != 1 or areas[0].size_bytes < layout.MAILBOX_OFFSET:
            for area in areas:
                area.close()
            raise UserError(f"function {self.name} is an ivshmem device whose memory cannot be mapped")
        self._area = areas[0]
        self._mapping = Mapping(self._area.fd, self._area.size_bytes, self._area.fd_offset)
        self._read_header(self._mapping.view)
        self._words = self._mapping.view[self._mailbox : self._mailbox + layout.DATA].cast("I")
        self._mail = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._irqs = [-1] * self._irq_count
        self._set_irqs()
        self._owner = Ownership(self._mapping.view, self._mapping.address)

    def _read_header(self, memory: memoryview) -> None:
        raw = bytes(memory[: layout.HEADER.size])
        magic, version, mailbox, owner, dma, dma_bytes, irqs, events = layout.HEADER.unpack(raw)
        if magic != layout.MAGIC:
            raise UserError(f"function {self.name} is an ivshmem device, but none of vvupipe's")
        if version != layout.VERSION or owner != layout.OWNER_OFFSET:
            raise UserError(
                f"function {self.name} is of another vvupipe (layout {version}, this one knows {layout.VERSION}): "
                "use the same version in the VM and outside"
            )
        if max(mailbox + layout.DATA + layout.DATA_BYTES, dma + dma_bytes) > len(memory) or events > layout.EVENTS_MAX:
            raise TransportError(f"function {self.name}: its header contradicts itself")
        self._mailbox, self._irq_count = mailbox, irqs
        self._dma, self._dma_bytes = dma, dma_bytes
        table = bytes(memory[layout.EVENT_TABLE_OFFSET :][: events * layout.EVENT_ENTRY.size])
        self._events = {
            (region, offset): peer << 16 | vector
            for region, offset, peer, vector in layout.EVENT_ENTRY.iter_unpack(table)
        }

    def dma_buffer(self) -> IvshmemDma:
        """Memory that the function reaches, owned by the caller; `dma_map` it as any other."""
        assert self._mapping is not None
        assert self._area is not None
        return IvshmemDma(self._area, self._mapping.view, self._dma, self._dma_bytes)

    # The mailbox.

    def _ask(self, operation: int, region: int = 0, offset: int = 0, count: int = 0, data: bytes = b"") -> int:
        """One request; returns the answer's value. Raises: TransportError."""
        if self._mapping is None:
            raise TransportError(f"function {self.name} was let go")
        memory, base = self._mapping.view, self._mailbox
        start = base + layout.DATA
        memory[start : start + len(data)] = data
        request = layout.REQUEST_FORMAT.pack(operation, region, offset, count, 0)
        memory[base + layout.REQUEST : base + layout.REQUEST + len(request)] = request
        asked = (self._words[layout.ANSWERED // 4] + 1) & 0xFFFFFFFF
        self._drain()
        self._words[layout.ASKED // 4] = asked
        bell = layout.PEER_MAILBOX << 16
        self._device.write(layout.BAR_REGISTERS, layout.REGISTER_DOORBELL, bell.to_bytes(4, "little"))
        self._wait(asked)
        start = base + layout.ANSWER
        status, _, value = layout.ANSWER_FORMAT.unpack(bytes(memory[start : start + layout.ANSWER_FORMAT.size]))
        if status:
            raise TransportError(
                f"function {self.name} refused operation {operation} on region {region}: {os.strerror(status)}"
            )
        return int(value)

    def _drain(self) -> None:
        try:
            os.read(self._mail, _EVENTFD_BYTES)
        except BlockingIOError:
            return  # it was empty

    def _wait(self, asked: int) -> None:
        deadline = time.monotonic() + _ANSWER_S
        poll = select.poll()
        poll.register(self._mail, select.POLLIN)
        while self._words[layout.ANSWERED // 4] != asked:
            if time.monotonic() > deadline:
                raise TransportError(f"function {self.name} has not answered for {_ANSWER_S:.0f} s")
            if poll.poll(_LOOK_MS):
                self._drain()

    # VfioFunction

    def region_size(self, region: int) -> int:
        """See VfioFunction."""
        return self._ask(layout.OPERATION_REGION_SIZE, region)

    def read(self, region: int, offset: int, count: int) -> bytes:
        """See VfioFunction."""
        data = b""
        while len(data) < count:
            size = min(count - len(data), layout.DATA_BYTES)
            self._ask(layout.OPERATION_READ, region, offset + len(data), size)
            assert self._mapping is not None
            start = self._mailbox + layout.DATA
            data += bytes(self._mapping.view[start : start + size])
        return data

    def write(self, region: int, offset: int, data: bytes) -> None:
        """See VfioFunction."""
        for done in range(0, len(data), layout.DATA_BYTES):
            piece = data[done : done + layout.DATA_BYTES]
            self._ask(layout.OPERATION_WRITE, region, offset + done, len(piece), piece)

    def mappable_areas(self, region: int) -> list[MappableArea]:
        """See VfioFunction: none; memory is found through the region table."""
        return []

    def io_event(self, region: int, offset: int, data: bytes) -> int | None:
        """See VfioFunction: the eventfd rings ivshmem's doorbell, whose peer stands for the register."""
        bell = self._events.get((region, offset))
        if bell is None:
            raise TransportError(f"function {self.name}: no doorbell stands for region {region}, offset {offset:#x}")
        return self._device.io_event(layout.BAR_REGISTERS, layout.REGISTER_DOORBELL, bell.to_bytes(4, "little"))

    def irq_count(self, index: int) -> int:
        """See VfioFunction."""
        return self._irq_count if index == IRQ_MSIX else 0

    def set_irq_eventfds(self, index: int, start: int, fds: Sequence[int]) -> None:
        """See VfioFunction."""
        if index != IRQ_MSIX or start + len(fds) > self._irq_count:
            raise TransportError(f"function {self.name} has {self.irq_count(index)} interrupts of kind {index}")
        self._irqs[start : start + len(fds)] = fds
        self._set_irqs()

    def disable_irqs(self, index: int) -> None:
        """See VfioFunction: the mailbox keeps its own."""
        if index == IRQ_MSIX:
            self._irqs = [-1] * self._irq_count
            self._set_irqs()

    def _set_irqs(self) -> None:
        # Linux before 6.5 takes all vectors of a function at once.
        self._device.set_irq_eventfds(IRQ_MSIX, layout.VECTOR_MAILBOX, [self._mail, *self._irqs])

    def dma_map(self, iova: int, size_bytes: int, fd: int, fd_offset: int) -> None:
        """See VfioFunction: the DMA area is mapped from the start, and nothing else can be."""
        assert self._area is not None
        inside = self._dma <= iova and iova + size_bytes <= self._dma + self._dma_bytes
        same = os.path.sameopenfile(fd, self._area.fd) and fd_offset == self._area.fd_offset + iova
        if not inside or not same:
            raise TransportError(f"function {self.name} reaches its own memory only")

    def dma_unmap(self, iova: int, size_bytes: int) -> None:
        """See VfioFunction: it goes with the function."""

    def reset(self) -> None:
        """See VfioFunction."""
        self._ask(layout.OPERATION_RESET)

    def close(self) -> None:
        """See VfioFunction."""
        if self._owner:
            self._owner.close()
            self._owner = None
        if self._mapping:
            if hasattr(self, "_words"):
                self._words.release()
            self._mapping.close()
            self._mapping = None
        if self._area:
            self._area.close()
            self._area = None
        self._device.close()
        if self._mail >= 0:
            os.close(self._mail)
            self._mail = -1


def open_ivshmem(device: VfioFunction) -> tuple[IvshmemFunction, IvshmemDma]:
    """The function that `device` carries, and memory for its driver's rings. `device` goes with it, also on errors.

    Raises: UserError when it is none of ours, TransportError when it does not behave.
    """
    function = IvshmemFunction(device)
    return function, function.dma_buffer()
