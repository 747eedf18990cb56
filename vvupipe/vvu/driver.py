"""The driver of a VVU function as a VFIO user-space program."""

from __future__ import annotations

import logging
import os
import time
from typing import Protocol

from vvupipe.errors import ProtocolError, TransportError, UserError
from vvupipe.memory.doorbell import Doorbell
from vvupipe.pci.config_space import COMMAND, COMMAND_MASTER, COMMAND_MEMORY, VENDOR_ID
from vvupipe.vfio.function import IRQ_MSIX, REGION_CONFIG, MappableArea, VfioFunction
from vvupipe.virtio import pci_common as common
from vvupipe.virtio.split_queue import DriverQueue, FlatMemory, QueueLayout
from vvupipe.vvu import layout, region_table
from vvupipe.vvu.capabilities import Structure, find_structures
from vvupipe.vvu.memory_windows import MemoryWindows
from vvupipe.vvu.region_table import Piece

log = logging.getLogger(__name__)

RX_BUFFERS = 64
TX_BUFFERS = 16
BUFFER_BYTES = 4096
_RESET_S = 5.0


class DmaBuffer(Protocol):
    """Memory of the device VM for rings and buffers: the bytes of `fd` at `fd_offset`, which are `view` here."""

    view: memoryview
    fd: int
    fd_offset: int
    gpa: int
    size_bytes: int

    def close(self) -> None:
        """Give it back."""


class VvuDriver:
    """Drives `function` with rings in `memory`; owns both. `start` makes it ready for a sibling."""

    def __init__(self, function: VfioFunction, memory: DmaBuffer, windows: MemoryWindows | None = None) -> None:
        """windows: where memory is found that is not in the function's own BAR; None: it always is."""
        self.function = function
        self._memory = memory
        self._windows = windows
        self._irqs: list[int] = []
        self._queues: list[DriverQueue] = []
        self._structures: dict[int, Structure] = {}
        self._mapped = False
        self._rx_buffers: dict[int, int] = {}  # head -> gpa
        self._tx_free: list[int] = []
        self._tx_buffers: dict[int, int] = {}
        self.max_vhost_queues = 0

    def start(self) -> None:
        """Reset the function and set it up; the last step is status bit 0.

        Raises: UserError when this is no VVU function or too few files may be open, TransportError when the function
        does not behave.
        """
        identity = self.function.read(REGION_CONFIG, VENDOR_ID, 4)
        vendor, device = int.from_bytes(identity[:2], "little"), int.from_bytes(identity[2:], "little")
        if vendor != layout.VENDOR_ID or device not in {layout.DEVICE_ID, layout.DEVICE_ID_PROTOTYPE}:
            raise UserError(f"function {self.function.name} is {vendor:04x}:{device:04x}, not a VVU function")
        self._structures = find_structures(self.function)
        needed = {layout.CFG_COMMON, layout.CFG_NOTIFY, layout.CFG_DEVICE, layout.CFG_DOORBELL}
        needed |= {layout.CFG_NOTIFICATION, layout.CFG_SHARED_MEMORY}
        if needed - self._structures.keys():
            raise TransportError(f"function {self.function.name} lacks capabilities of a VVU function")
        command = int.from_bytes(self.function.read(REGION_CONFIG, COMMAND, 2), "little")
        enabled = command | COMMAND_MEMORY | COMMAND_MASTER
        self.function.write(REGION_CONFIG, COMMAND, enabled.to_bytes(2, "little"))
        self._reset()
        self._set_status(common.STATUS_ACKNOWLEDGE)
        self._set_status(common.STATUS_DRIVER)
        self._negotiate()
        self.max_vhost_queues = self._get(layout.CFG_DEVICE, 4, 4)
        self._memory.view[:] = bytes(len(self._memory.view))
        self.function.dma_map(self._memory.gpa, self._memory.size_bytes, self._memory.fd, self._memory.fd_offset)
        self._mapped = True
        self._set_up_interrupts()
        self._set_up_queues()
        self._set_status(common.STATUS_DRIVER_OK)
        self._notify(layout.RXQ)
        self.set_backend_up(True)

    # Registers.

    def _get(self, structure: int, offset: int, width: int) -> int:
        where = self._structures[structure]
        return int.from_bytes(self.function.read(where.bar, where.offset + offset, width), "little")

    def _put(self, structure: int, offset: int, width: int, value: int) -> None:
        where = self._structures[structure]
        self.function.write(where.bar, where.offset + offset, value.to_bytes(width, "little"))

    def _reset(self) -> None:
        self._put(layout.CFG_COMMON, common.DEVICE_STATUS, 1, 0)
        deadline = time.monotonic() + _RESET_S
        while self._get(layout.CFG_COMMON, common.DEVICE_STATUS, 1):
            if time.monotonic() > deadline:
                raise TransportError(f"function {self.function.name} does not come out of its reset")
            time.sleep(0.001)

    def _set_status(self, bit: int) -> None:
        status = self._get(layout.CFG_COMMON, common.DEVICE_STATUS, 1)
        self._put(layout.CFG_COMMON, common.DEVICE_STATUS, 1, status | bit)
        if not self._get(layout.CFG_COMMON, common.DEVICE_STATUS, 1) & bit:
            raise TransportError(f"function {self.function.name} refused status bit {bit:#x}")

    def _negotiate(self) -> None:
        offered = 0
        for select in (0, 1):
            self._put(layout.CFG_COMMON, common.DEVICE_FEATURE_SELECT, 4, select)
            offered |= self._get(layout.CFG_COMMON, common.DEVICE_FEATURE, 4) << 32 * select
        missing = layout.FEATURES & ~offered
        if missing:
            raise TransportError(f"function {self.function.name} lacks features {missing:#x}")
        for select in (0, 1):
            self._put(layout.CFG_COMMON, common.DRIVER_FEATURE_SELECT, 4, select)
            self._put(layout.CFG_COMMON, common.DRIVER_FEATURE, 4, layout.FEATURES >> 32 * select & 0xFFFFFFFF)
        self._set_status(common.STATUS_FEATURES_OK)

    def _set_up_interrupts(self) -> None:
        count = layout.vector_count(self.max_vhost_queues)
        offered = self.function.irq_count(IRQ_MSIX)
        if offered < count:
            raise TransportError(f"function {self.function.name} has {offered} MSI-X vectors, {count} are needed")
        try:
            for _ in range(count):
                self._irqs.append(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
        except OSError as error:
            raise UserError(
                f"function {self.function.name} needs {count} eventfds ({error.strerror}): raise ulimit -n"
            ) from error
        self.function.set_irq_eventfds(IRQ_MSIX, 0, self._irqs)
        self._put(layout.CFG_COMMON, common.CONFIG_MSIX_VECTOR, 2, layout.VECTOR_CONFIG)

    def _set_up_queues(self) -> None:
        memory = FlatMemory(self._memory.view, self._memory.gpa)
        start = self._memory.gpa
        for queue, vector in ((layout.RXQ, layout.VECTOR_RXQ), (layout.TXQ, layout.VECTOR_TXQ)):
            self._put(layout.CFG_COMMON, common.QUEUE_SELECT, 2, queue)
            size = min(self._get(layout.CFG_COMMON, common.QUEUE_SIZE, 2), layout.QUEUE_SIZE)
            where = QueueLayout.packed_at(start, size)
            start = (where.end_gpa + BUFFER_BYTES - 1) // BUFFER_BYTES * BUFFER_BYTES
            self._queues.append(DriverQueue(memory, where))
            self._put(layout.CFG_COMMON, common.QUEUE_SIZE, 2, size)
            self._put(layout.CFG_COMMON, common.QUEUE_MSIX_VECTOR, 2, vector)
            if self._get(layout.CFG_COMMON, common.QUEUE_MSIX_VECTOR, 2) != vector:
                raise TransportError(f"function {self.function.name} refused MSI-X vector {vector}")
            for register, gpa in (
                (common.QUEUE_DESC, where.desc_gpa),
                (common.QUEUE_DRIVER, where.avail_gpa),
                (common.QUEUE_DEVICE, where.used_gpa),
            ):
                self._put(layout.CFG_COMMON, register, 4, gpa & 0xFFFFFFFF)
                self._put(layout.CFG_COMMON, register + 4, 4, gpa >> 32)
            self._put(layout.CFG_COMMON, common.QUEUE_ENABLE, 2, 1)
        for _ in range(min(RX_BUFFERS, self._queues[layout.RXQ].layout.size)):
            self._post(start)
            start += BUFFER_BYTES
        self._tx_free = [start + k * BUFFER_BYTES for k in range(TX_BUFFERS)]

    def _notify(self, queue: int) -> None:
        # queue_notify_off equals the queue's number with us, but the register says so.
        self._put(layout.CFG_COMMON, common.QUEUE_SELECT, 2, queue)
        offset = self._get(layout.CFG_COMMON, common.QUEUE_NOTIFY_OFF, 2)
        self._put(layout.CFG_NOTIFY, offset * self._structures[layout.CFG_NOTIFY].extra, 2, queue)

    # Status.

    def set_backend_up(self, up: bool) -> None:
        """Status bit 0 of the device configuration: siblings are welcome, or the present one must go."""
        self._put(layout.CFG_DEVICE, 0, 4, layout.STATUS_BACKEND_UP if up else 0)

    def check(self) -> None:
        """Raises: TransportError when the function asks to be reset."""
        if self._get(layout.CFG_COMMON, common.DEVICE_STATUS, 1) & common.STATUS_NEEDS_RESET:
            raise TransportError(f"function {self.function.name} failed and must be reset: start again")

    # Messages.

    @property
    def rx_eventfd(self) -> int:
        """Signalled when messages are there."""
        return self._irqs[layout.VECTOR_RXQ]

    @property
    def tx_eventfd(self) -> int:
        """Signalled when tx buffers came back."""
        return self._irqs[layout.VECTOR_TXQ]

    @property
    def config_eventfd(self) -> int:
        """Signalled when the device configuration changed, or the function failed."""
        return self._irqs[layout.VECTOR_CONFIG]

    def _post(self, gpa: int) -> None:
        head = self._queues[layout.RXQ].add([], [(gpa, BUFFER_BYTES)])
        self._rx_buffers[head] = gpa

    def _take(self, queue: int) -> tuple[int, int] | None:
        try:
            return self._queues[queue].take()
        except ProtocolError as error:
            raise TransportError(f"function {self.function.name}: {error}") from error

    def take_message(self) -> tuple[bytes, int] | None:
        """(message, its buffer) of the next one on the rxq, or None. `give_back` the buffer once it is dealt with."""
        taken = self._take(layout.RXQ)
        if taken is None:
            return None
        head, written = taken
        gpa = self._rx_buffers.pop(head)
        if written > BUFFER_BYTES:
            raise TransportError(f"function {self.function.name} wrote {written} bytes into {BUFFER_BYTES}")
        start = gpa - self._memory.gpa
        return bytes(self._memory.view[start : start + written]), gpa

    def give_back(self, buffer_gpa: int) -> None:
        """Post an rx buffer again: it tells the function that the message was dealt with."""
        self._post(buffer_gpa)
        self._notify(layout.RXQ)

    def put_message(self, data: bytes) -> bool:
        """Put a message on the txq. False when every buffer is under way: wait for `tx_eventfd`."""
        queue = self._queues[layout.TXQ]
        while (taken := self._take(layout.TXQ)) is not None:
            self._tx_free.append(self._tx_buffers.pop(taken[0]))
        if not self._tx_free:
            return False
        if len(data) > BUFFER_BYTES:
            raise ProtocolError(f"a message of {len(data)} bytes")
        gpa = self._tx_free.pop()
        start = gpa - self._memory.gpa
        self._memory.view[start : start + len(data)] = data
        self._tx_buffers[queue.add([(gpa, len(data))], [])] = gpa
        self._notify(layout.TXQ)
        return True

    # Memory, kicks, doorbells.

    async def shared_memory_areas(self) -> list[MappableArea]:
        """The areas of the shared-memory BAR as they are now, offsets counted from the start of the structure.

        Raises: TransportError when a window that the function tells of does not appear.
        """
        pieces = self._region_table()
        if any(piece.place != layout.WINDOW_IN_BAR for piece in pieces):
            assert self._windows is not None
            return await self._windows.areas(pieces)
        where = self._structures[layout.CFG_SHARED_MEMORY]
        areas = self.function.mappable_areas(where.bar)
        for area in areas:
            area.offset -= where.offset
        return areas

    def _region_table(self) -> list[Piece]:
        where = self._structures.get(layout.CFG_REGION_TABLE)
        if where is None or self._windows is None:
            return []
        head_bytes = layout.REGION_TABLE_HEAD.size
        count = region_table.unpack_count(self.function.read(where.bar, where.offset, head_bytes))
        size = count * layout.REGION_TABLE_ENTRY.size
        return region_table.unpack_entries(self.function.read(where.bar, where.offset + head_bytes, size))

    def kick_eventfd(self, index: int) -> int:
        """Have kicks of vring `index` raise its vector. Returns that vector's eventfd, owned by the caller."""
        self._check_vring(index)
        vector = layout.VECTOR_FIRST_VRING + index
        self._put(layout.CFG_NOTIFICATION, layout.NOTIFICATION_SELECT, 2, index)
        self._put(layout.CFG_NOTIFICATION, layout.NOTIFICATION_VECTOR, 2, vector)
        if self._get(layout.CFG_NOTIFICATION, layout.NOTIFICATION_VECTOR, 2) != vector:
            raise TransportError(f"function {self.function.name} refused vector {vector} for vring {index}")
        return os.dup(self._irqs[vector])

    def doorbell(self, index: int, *, err: bool = False) -> Doorbell | None:
        """The doorbell of vring `index` as it is now; None when the sibling has tied nothing to it."""
        self._check_vring(index)
        return self._doorbell(index + (layout.ERR_DOORBELL_BASE if err else 0))

    def log_doorbell(self) -> Doorbell | None:
        """The doorbell that tells of news in the sibling's dirty-page log."""
        return self._doorbell(layout.LOG_DOORBELL)

    def _doorbell(self, number: int) -> Doorbell | None:
        where = self._structures[layout.CFG_DOORBELL]
        wanted = where.offset + number * where.extra
        fd = self.function.io_event(where.bar, wanted, bytes(layout.DOORBELL_WRITE_BYTES))
        return None if fd is None else Doorbell(fd)

    def _check_vring(self, index: int) -> None:
        if index >= self.max_vhost_queues:
            raise ProtocolError(f"vring {index} is beyond the function's {self.max_vhost_queues}")

    def close(self) -> None:
        """Reset the function if it is still there, and let go of everything. Harmless when called again."""
        try:
            if self._structures and self._irqs:
                self._reset()
                self.function.disable_irqs(IRQ_MSIX)
            if self._mapped:
                self.function.dma_unmap(self._memory.gpa, self._memory.size_bytes)
        except TransportError as error:
            log.debug("letting go of a function that is not there: %s", error)
        self._mapped = False
        self._structures = {}
        while self._irqs:
            os.close(self._irqs.pop())
        while self._queues:
            self._queues.pop().close()
        self.function.close()
        self._memory.close()
