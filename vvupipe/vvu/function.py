"""The VVU PCI function, to the register (docs/vvu.md). `proxy` gives it its sibling.

Implements vfio.served_function.ServedFunction; everything runs in the event loop of the VM.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Sequence
from typing import Protocol

from vvupipe.errors import ProtocolError
from vvupipe.vfio.dma_space import DmaSpace
from vvupipe.vfio.function import IRQ_MSIX, REGION_CONFIG, IoEvent
from vvupipe.vfio.irq_table import IrqTable
from vvupipe.vfio.served_function import Region
from vvupipe.virtio.pci_common import COMMON_CONFIG_BYTES, CommonConfig
from vvupipe.virtio.split_queue import DeviceQueue
from vvupipe.vvu import layout, region_table
from vvupipe.vvu.identity import build_identity
from vvupipe.vvu.kick_relay import KickRelay
from vvupipe.vvu.notifications import Notifications
from vvupipe.vvu.region_table import Piece
from vvupipe.vvu.shared_memory_bar import SharedMemoryBar

log = logging.getLogger(__name__)


class Backend(Protocol):
    """Whoever wants to know what the driver does: the proxy."""

    def backend_up(self) -> None:
        """The driver is ready for a sibling."""

    def backend_down(self) -> None:
        """The driver is not ready any more, or gone."""

    def notified(self, queue: int) -> None:
        """The driver made chains available."""


class VvuFunction:
    """One function. `name` is for people."""

    def __init__(
        self,
        name: str,
        relay: KickRelay,
        *,
        max_vhost_queues: int = layout.MAX_VHOST_QUEUES,
        uuid: bytes = bytes(16),
        shared_memory_bytes: int = layout.SHARED_MEMORY_BYTES,
    ) -> None:
        self.name = name
        self.backend: Backend | None = None
        identity = build_identity(max_vhost_queues, shared_memory_bytes)
        self.config, self._msix, self._pci_cfg = identity.config, identity.msix, identity.pci_cfg_offset
        self._flr = identity.advanced_features_offset + layout.AF_CONTROL
        self.dma = DmaSpace()
        msix_irqs = IrqTable(self._msix.count)
        msix_irqs.on_pending = self._msix.set_pending
        self._irqs = msix_irqs
        self.irqs = {IRQ_MSIX: msix_irqs}
        self.notifications = Notifications(max_vhost_queues, msix_irqs, relay)
        self.shared_memory = SharedMemoryBar(shared_memory_bytes)
        self._region_table = region_table.pack([])
        self._uuid = uuid
        self._status = 0
        self._isr = 0
        self._queues: list[DeviceQueue | None] = [None] * layout.NUM_QUEUES
        self._common = CommonConfig(
            layout.FEATURES, [layout.QUEUE_SIZE] * layout.NUM_QUEUES, layout.vector_count(max_vhost_queues)
        )
        self._common.on_reset = self._virtio_reset
        self._common.on_status = self._start_queues
        self._common.on_enable = self._start_queues

    # The proxy's side.

    def queue(self, index: int) -> DeviceQueue | None:
        """A queue while the driver drives it."""
        return self._queues[index]

    def interrupt_queue(self, index: int) -> None:
        """Tell the driver that chains of a queue came back."""
        self._isr |= layout.ISR_QUEUE
        self._irqs.signal(self._common.queues[index].vector)

    def show_regions(self, pieces: Sequence[Piece]) -> None:
        """Where the driver finds what is in BAR 4 now. Raises: ValueError when there are too many pieces."""
        self._region_table = region_table.pack(pieces)

    def set_frontend_up(self, up: bool) -> None:
        """Status bit 1; a change raises the configuration interrupt."""
        before = self._status
        self._status = (before & ~layout.STATUS_FRONTEND_UP) | (layout.STATUS_FRONTEND_UP if up else 0)
        if self._status != before:
            self._config_interrupt()

    def fail(self, error: ProtocolError) -> None:
        """The driver broke its side: the function asks to be reset (virtio 1.2, 2.1.2)."""
        log.error("%s: the driver broke the protocol: %s", self.name, error)
        self._stop_queues()
        self._common.need_reset()
        self._config_interrupt()
        self._backend_down()

    def _config_interrupt(self) -> None:
        self._common.config_changed()
        self._isr |= layout.ISR_CONFIG
        self._irqs.signal(self._common.config_vector)

    # Life cycle.

    def _start_queues(self, _: int) -> None:
        """The driver set a status bit or enabled a queue, which may come after DRIVER_OK."""
        if not self._common.driver_ok or all(self._queues):
            return
        try:
            for index, registers in enumerate(self._common.queues):
                if registers.enabled and not self._queues[index]:
                    self._queues[index] = DeviceQueue(self.dma, registers.layout)
        except ProtocolError as error:
            self.fail(error)
            return
        self._announce_backend()

    def _announce_backend(self) -> None:
        if self._status & layout.STATUS_BACKEND_UP and all(self._queues) and self.backend:
            self.backend.backend_up()

    def _virtio_reset(self) -> None:
        """The driver wrote status 0, or everything is reset."""
        self._status &= ~layout.STATUS_BACKEND_UP
        self._stop_queues()
        self._backend_down()
        self.notifications.forget_driver()
        self._isr = 0

    def _backend_down(self) -> None:
        if self.backend:
            self.backend.backend_down()

    def _stop_queues(self) -> None:
        for index, queue in enumerate(self._queues):
            if queue:
                queue.close()
            self._queues[index] = None

    def before_unmap(self, iova: int, size_bytes: int) -> None:
        """See ServedFunction: a driver that takes away a queue in use has not stopped it."""
        for index, registers in enumerate(self._common.queues):
            parts = registers.layout.parts if self._queues[index] else []
            if any(start < iova + size_bytes and iova < start + size for start, size in parts):
                self.fail(ProtocolError("the memory of a queue in use was unmapped"))
                return

    def reset(self) -> None:
        """See ServedFunction: everything as after power-on but the BARs' places and the client's eventfds."""
        self._common.reset()
        self._virtio_reset()
        self._msix.reset()
        self.config.reset()

    def client_left(self) -> None:
        """See ServedFunction: a back-end whose process died is a back-end that went away."""
        self.reset()

    def close(self) -> None:
        """Let go of the sibling's memory and eventfds."""
        self._stop_queues()
        self.dma.clear()
        for table in self.irqs.values():
            table.disable()
        self.notifications.forget_sibling()
        self.shared_memory.clear()

    # Regions.

    def region(self, index: int) -> Region:
        """See ServedFunction."""
        if index == REGION_CONFIG:
            return Region(256)
        if index == layout.BAR_SHARED_MEMORY:
            return Region(self.shared_memory.size_bytes, tuple(self.shared_memory.areas))
        sizes = {bar.index: bar.size_bytes for bar in self.config.bars}
        return Region(sizes.get(index, 0))

    def io_events(self, region: int) -> list[IoEvent]:
        """See ServedFunction."""
        return self.notifications.io_events() if region == layout.BAR_DOORBELL else []

    def read(self, region: int, offset: int, count: int) -> bytes:
        """See ServedFunction."""
        if not count:
            return b""  # no access, so without its effects
        if region == REGION_CONFIG:
            return self._read_config(offset, count)
        if region == layout.BAR_VIRTIO:
            return self._read_virtio(offset, count)
        if region == layout.BAR_DOORBELL:
            if offset >= layout.REGION_TABLE_OFFSET:
                place = offset - layout.REGION_TABLE_OFFSET
                return self._region_table[place : place + count].ljust(count, b"\0")
            return self.notifications.read(offset, count)
        if region == layout.BAR_SHARED_MEMORY:
            return self.shared_memory.read(offset, count)
        raise OSError(errno.EINVAL, f"region {region} does not exist")

    def write(self, region: int, offset: int, data: bytes) -> None:
        """See ServedFunction."""
        if not data:
            return
        if region == REGION_CONFIG:
            self._write_config(offset, data)
        elif region == layout.BAR_VIRTIO:
            self._write_virtio(offset, data)
        elif region == layout.BAR_DOORBELL:
            self.notifications.write(offset, data)
        elif region == layout.BAR_SHARED_MEMORY:
            self.shared_memory.write(offset, data)
        else:
            raise OSError(errno.EINVAL, f"region {region} does not exist")

    def _read_virtio(self, offset: int, count: int) -> bytes:
        start, place = _place(offset)
        match start:
            case layout.COMMON_OFFSET:
                return self._common.read(place, count)
            case layout.ISR_OFFSET if place == 0:
                value, self._isr = self._isr, 0  # 4.1.4.5: reading it clears it
                return bytes((value,)).ljust(count, b"\0")
            case layout.DEVICE_CONFIG_OFFSET:
                image = layout.DEVICE_CONFIG.pack(self._status, self.notifications.count, self._uuid)
                return image[place : place + count].ljust(count, b"\0")
            case layout.MSIX_TABLE_OFFSET:
                return self._msix.read_table(place, count)
            case layout.MSIX_PBA_OFFSET:
                return self._msix.read_pending(place, count)
        return bytes(count)

    def _write_virtio(self, offset: int, data: bytes) -> None:
        start, place = _place(offset)
        match start:
            case layout.COMMON_OFFSET if place < COMMON_CONFIG_BYTES:
                self._common.write(place, data)
            case layout.DEVICE_CONFIG_OFFSET if place == 0:
                self._write_status(data[0])
            case layout.NOTIFY_OFFSET if place < layout.NOTIFY_BYTES:
                queue = place // layout.NOTIFY_MULTIPLIER
                if self._queues[queue] and self.backend:
                    self.backend.notified(queue)
            case layout.MSIX_TABLE_OFFSET:
                self._msix.write_table(place, data)

    def _write_status(self, value: int) -> None:
        up = value & layout.STATUS_BACKEND_UP
        if up == self._status & layout.STATUS_BACKEND_UP:
            return
        self._status ^= layout.STATUS_BACKEND_UP
        if up:
            self._announce_backend()
        else:
            self._backend_down()

    # Configuration space, with the window into the BARs (virtio 1.2, 4.1.4.9).

    def _read_config(self, offset: int, count: int) -> bytes:
        data = self._pci_cfg + layout.PCI_CFG_DATA
        if offset < data + layout.PCI_CFG_DATA_BYTES and data < offset + count:
            where = self._window()
            if where:
                value = self.read(*where).ljust(layout.PCI_CFG_DATA_BYTES, b"\0")
                self.config.set(data, layout.PCI_CFG_DATA_BYTES, int.from_bytes(value, "little"))
        return self.config.read(offset, count)

    def _write_config(self, offset: int, data: bytes) -> None:
        control = self._flr - offset
        if 0 <= control < len(data) and data[control] & layout.AF_INITIATE_FLR:
            self.reset()
            return
        self.config.write(offset, data)
        start = self._pci_cfg + layout.PCI_CFG_DATA
        if offset < start + layout.PCI_CFG_DATA_BYTES and start < offset + len(data):
            where = self._window()
            if where:
                bar, bar_offset, length = where
                self.write(bar, bar_offset, self.config.read(start, length))

    def _window(self) -> tuple[int, int, int] | None:
        bar = self.config.get(self._pci_cfg + layout.PCI_CFG_BAR, 1)
        offset = self.config.get(self._pci_cfg + layout.PCI_CFG_OFFSET, 4)
        length = self.config.get(self._pci_cfg + layout.PCI_CFG_LENGTH, 4)
        if length not in {1, 2, 4} or bar > 5 or offset + length > self.region(bar).size_bytes:
            return None
        return bar, offset, length


_STRUCTURES = (
    layout.MSIX_PBA_OFFSET,
    layout.MSIX_TABLE_OFFSET,
    layout.NOTIFY_OFFSET,
    layout.DEVICE_CONFIG_OFFSET,
    layout.ISR_OFFSET,
    layout.COMMON_OFFSET,
)


def _place(offset: int) -> tuple[int, int]:
    """(start of the structure in BAR 0, offset in it)."""
    start = next(start for start in _STRUCTURES if offset >= start)
    return start, offset - start
