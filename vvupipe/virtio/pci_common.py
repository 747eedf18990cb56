"""The common configuration structure of virtio-pci as a device has it (virtio 1.2, 4.1.4.3)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from kernels.virtio_layout import F_VERSION_1
from vvupipe.virtio.split_queue import QueueLayout

log = logging.getLogger(__name__)

COMMON_CONFIG_BYTES = 56  # up to and with queue_device; neither NOTIFICATION_DATA nor RING_RESET is offered
NO_VECTOR = 0xFFFF

# 2.1 Device Status Field
STATUS_ACKNOWLEDGE = 1
STATUS_DRIVER = 2
STATUS_DRIVER_OK = 4
STATUS_FEATURES_OK = 8
STATUS_NEEDS_RESET = 64
STATUS_FAILED = 128

# 4.1.4.3: offset of each field
DEVICE_FEATURE_SELECT = 0
DEVICE_FEATURE = 4
DRIVER_FEATURE_SELECT = 8
DRIVER_FEATURE = 12
CONFIG_MSIX_VECTOR = 16
NUM_QUEUES = 18
DEVICE_STATUS = 20
CONFIG_GENERATION = 21
QUEUE_SELECT = 22
QUEUE_SIZE = 24
QUEUE_MSIX_VECTOR = 26
QUEUE_ENABLE = 28
QUEUE_NOTIFY_OFF = 30
QUEUE_DESC = 32
QUEUE_DRIVER = 40
QUEUE_DEVICE = 48

_WIDTHS = {
    DEVICE_FEATURE_SELECT: 4,
    DEVICE_FEATURE: 4,
    DRIVER_FEATURE_SELECT: 4,
    DRIVER_FEATURE: 4,
    CONFIG_MSIX_VECTOR: 2,
    NUM_QUEUES: 2,
    DEVICE_STATUS: 1,
    CONFIG_GENERATION: 1,
    QUEUE_SELECT: 2,
    QUEUE_SIZE: 2,
    QUEUE_MSIX_VECTOR: 2,
    QUEUE_ENABLE: 2,
    QUEUE_NOTIFY_OFF: 2,
    QUEUE_DESC: 8,
    QUEUE_DRIVER: 8,
    QUEUE_DEVICE: 8,
}


@dataclass(slots=True)
class QueueRegisters:
    """One queue's registers."""

    size_max: int
    size: int = 0
    vector: int = NO_VECTOR
    enabled: bool = False
    addresses: dict[int, int] = field(default_factory=lambda: {QUEUE_DESC: 0, QUEUE_DRIVER: 0, QUEUE_DEVICE: 0})

    def reset(self) -> None:
        """As after power-on: the offered size is the largest."""
        self.size, self.vector, self.enabled = self.size_max, NO_VECTOR, False
        self.addresses = dict.fromkeys(self.addresses, 0)

    @property
    def layout(self) -> QueueLayout:
        """The queue as the driver described it."""
        desc, avail, used = (self.addresses[key] for key in (QUEUE_DESC, QUEUE_DRIVER, QUEUE_DEVICE))
        return QueueLayout(self.size, desc, avail, used)


class CommonConfig:
    """Registers of a device with queues of the given largest sizes and `vectors` MSI-X vectors.

    The owner sets the callbacks: `on_reset` (the driver wrote status 0), `on_status` (any other accepted change),
    `on_enable(queue)`.
    """

    def __init__(self, features: int, queue_sizes: list[int], vectors: int) -> None:
        self.offered_features = features
        self.queues = [QueueRegisters(size) for size in queue_sizes]
        self._vectors = vectors
        self.on_reset: Callable[[], None] = lambda: None
        self.on_status: Callable[[int], None] = lambda status: None
        self.on_enable: Callable[[int], None] = lambda queue: None
        self.generation = 0
        self.reset()

    def reset(self) -> None:
        """As after power-on (without telling the owner). The configuration generation only ever grows."""
        self.status = 0
        self.driver_features = 0
        self.config_vector = NO_VECTOR
        self._device_select = 0
        self._driver_select = 0
        self._queue_select = 0
        for queue in self.queues:
            queue.reset()

    def need_reset(self) -> None:
        """Set DEVICE_NEEDS_RESET (2.1.2)."""
        self.status |= STATUS_NEEDS_RESET

    def config_changed(self) -> None:
        """The device configuration changed: a driver that reads it in pieces must see that."""
        self.generation = (self.generation + 1) & 0xFF

    @property
    def driver_ok(self) -> bool:
        """Whether the driver drives the device and the device has not failed."""
        return self.status & (STATUS_DRIVER_OK | STATUS_NEEDS_RESET) == STATUS_DRIVER_OK

    def read(self, offset: int, count: int) -> bytes:
        """What a read of the structure gives; zeros beyond it."""
        image = bytearray(COMMON_CONFIG_BYTES)
        for start, width in _WIDTHS.items():
            if start < offset + count and offset < start + width:
                image[start : start + width] = self._get(start).to_bytes(width, "little")
        return bytes(image[offset : offset + count]).ljust(count, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        """A write of one whole field, or of one half of a 64-bit one (4.1.3.1); others are ignored."""
        width = _WIDTHS.get(offset)
        if width == len(data):
            self._set(offset, int.from_bytes(data, "little"))
        elif len(data) == 4 and offset & ~4 in (QUEUE_DESC, QUEUE_DRIVER, QUEUE_DEVICE):
            shift = 8 * (offset & 4)
            kept = self._get(offset & ~4) & ~(0xFFFFFFFF << shift)
            self._set(offset & ~4, kept | int.from_bytes(data, "little") << shift)
        else:
            log.debug("a write of %d bytes at %d fits no field of the common configuration", len(data), offset)

    def _queue(self) -> QueueRegisters | None:
        return self.queues[self._queue_select] if self._queue_select < len(self.queues) else None

    def _get(self, offset: int) -> int:
        queue = self._queue()
        if offset >= QUEUE_SIZE and queue is None:
            return 0  # "queue_size: 0 means the queue is unavailable"
        match offset:
            case 0:
                return self._device_select
            case 4:
                return _window(self.offered_features, self._device_select)
            case 8:
                return self._driver_select
            case 12:
                return _window(self.driver_features, self._driver_select)
            case 16:
                return self.config_vector
            case 18:
                return len(self.queues)
            case 20:
                return self.status
            case 21:
                return self.generation
            case 22:
                return self._queue_select
        assert queue is not None
        match offset:
            case 24:
                return queue.size
            case 26:
                return queue.vector
            case 28:
                return int(queue.enabled)
            case 30:
                return self._queue_select
        return queue.addresses[offset]

    def _set(self, offset: int, value: int) -> None:
        match offset:
            case 0:
                self._device_select = value
            case 8:
                self._driver_select = value
            case 12:
                self._set_driver_features(value)
            case 16:
                self.config_vector = self._checked_vector(value)
            case 20:
                self._set_status(value)
            case 22:
                self._queue_select = value
            case _:
                queue = self._queue()
                if queue is not None and offset >= QUEUE_SIZE:
                    self._set_queue(queue, offset, value)

    def _set_queue(self, queue: QueueRegisters, offset: int, value: int) -> None:
        if offset == QUEUE_MSIX_VECTOR:
            queue.vector = self._checked_vector(value)
        elif queue.enabled:
            log.debug("a write to register %d of a queue that is enabled", offset)
        elif offset == QUEUE_SIZE:
            if 0 < value <= queue.size_max and not value & (value - 1):
                queue.size = value
        elif offset == QUEUE_ENABLE:
            if value == 1:  # "The driver MUST NOT write a 0 to queue_enable"
                queue.enabled = True
                self.on_enable(self._queue_select)
        elif offset in queue.addresses:
            queue.addresses[offset] = value

    def _checked_vector(self, value: int) -> int:
        # 4.1.5.1.2.1: a vector that cannot be used reads back as NO_VECTOR
        return value if value < self._vectors else NO_VECTOR

    def _set_driver_features(self, value: int) -> None:
        if self._driver_select < 2 and not self.status & STATUS_FEATURES_OK:
            shift = 32 * self._driver_select
            self.driver_features = (self.driver_features & ~(0xFFFFFFFF << shift)) | value << shift

    def _set_status(self, value: int) -> None:
        if value == 0:
            self.reset()
            self.on_reset()
            return
        if value & STATUS_FEATURES_OK and not self.status & STATUS_FEATURES_OK:
            unknown = self.driver_features & ~self.offered_features
            if unknown or not self.driver_features & F_VERSION_1:
                log.warning("driver features %#x refused, offered %#x", self.driver_features, self.offered_features)
                value &= ~STATUS_FEATURES_OK
        if value & STATUS_DRIVER_OK and not value & STATUS_FEATURES_OK:
            value &= ~STATUS_DRIVER_OK  # 3.1.1: there is no use before FEATURES_OK
        # 2.1.1: the driver never clears a bit, NEEDS_RESET is the device's
        self.status |= value & ~STATUS_NEEDS_RESET
        self.on_status(self.status)


def _window(features: int, select: int) -> int:
    return features >> (32 * select) & 0xFFFFFFFF if select < 2 else 0
