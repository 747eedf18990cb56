"""The configuration space of a conventional PCI function with a type-0 header (PCI Local Bus 3.0, chapter 6)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

CONFIG_BYTES = 256

# 6.1: offsets of the header's registers
VENDOR_ID = 0x00
DEVICE_ID = 0x02
COMMAND = 0x04
STATUS = 0x06
REVISION_ID = 0x08
CLASS_CODE = 0x09
CACHE_LINE_SIZE = 0x0C
HEADER_TYPE = 0x0E
BASE_ADDRESS = 0x10
SUBSYSTEM_VENDOR_ID = 0x2C
SUBSYSTEM_ID = 0x2E
CAPABILITIES = 0x34
INTERRUPT_LINE = 0x3C
INTERRUPT_PIN = 0x3D
_FIRST_CAPABILITY = 0x40

# 6.2.2 Command
COMMAND_MEMORY = 1 << 1
COMMAND_MASTER = 1 << 2
COMMAND_SERR = 1 << 8
COMMAND_INTX_DISABLE = 1 << 10
_COMMAND_WRITABLE = COMMAND_MEMORY | COMMAND_MASTER | COMMAND_SERR | COMMAND_INTX_DISABLE

STATUS_CAPABILITIES = 1 << 4  # 6.2.3

# 6.2.5 Base Addresses
BAR_64 = 0b100
BAR_PREFETCHABLE = 0b1000
_BAR_MIN_BYTES = 16

CAP_VENDOR = 0x09  # appendix H
CAP_MSIX = 0x11
CAP_ADVANCED_FEATURES = 0x13  # ECN "Conventional PCI Advanced Features"


@dataclass(frozen=True, slots=True)
class Bar:
    """A memory base address register; a 64-bit one takes `index` and the next."""

    index: int
    size_bytes: int
    is_64bit: bool = False
    prefetchable: bool = False

    def __post_init__(self) -> None:
        if self.size_bytes < _BAR_MIN_BYTES or self.size_bytes & (self.size_bytes - 1):
            raise ValueError(f"a BAR's size is a power of two from 16 up, not {self.size_bytes}")
        if not self.is_64bit and self.size_bytes > 1 << 31:
            raise ValueError(f"{self.size_bytes} bytes need a 64-bit BAR")


class ConfigSpace:
    """256 bytes, of which the driver can write what the specification lets it."""

    def __init__(
        self,
        *,
        vendor: int,
        device: int,
        class_code: int,
        revision: int = 0,
        subsystem_vendor: int = 0,
        subsystem: int = 0,
    ) -> None:
        """class_code: 24 bits, base class in the highest."""
        self._bytes = bytearray(CONFIG_BYTES)
        self._writable = bytearray(CONFIG_BYTES)
        self._bars: dict[int, Bar] = {}
        self._last_link = CAPABILITIES
        self._free = _FIRST_CAPABILITY
        #: called after every write by the driver that changed something
        self.on_change: Callable[[], None] = lambda: None
        self.set(VENDOR_ID, 2, vendor)
        self.set(DEVICE_ID, 2, device)
        self.set(REVISION_ID, 1, revision)
        self.set(CLASS_CODE, 3, class_code)
        self.set(SUBSYSTEM_VENDOR_ID, 2, subsystem_vendor)
        self.set(SUBSYSTEM_ID, 2, subsystem)
        self._allow(COMMAND, 2, _COMMAND_WRITABLE)
        self._allow(CACHE_LINE_SIZE, 1, 0xFF)
        self._allow(INTERRUPT_LINE, 1, 0xFF)
        self._at_reset = bytes(self._bytes)

    def _allow(self, offset: int, width: int, mask: int) -> None:
        self._writable[offset : offset + width] = mask.to_bytes(width, "little")

    def set(self, offset: int, width: int, value: int) -> None:
        """Set a register from the device's side, read-only or not."""
        self._bytes[offset : offset + width] = value.to_bytes(width, "little")

    def get(self, offset: int, width: int) -> int:
        """A register's value."""
        return int.from_bytes(self._bytes[offset : offset + width], "little")

    def add_bar(self, bar: Bar) -> None:
        """Add a BAR whose size the driver can find by writing ones. Raises: ValueError when the place is taken."""
        slots = {bar.index, bar.index + 1} if bar.is_64bit else {bar.index}
        taken = {k for b in self._bars.values() for k in ((b.index, b.index + 1) if b.is_64bit else (b.index,))}
        if slots & taken or max(slots) > 5:
            raise ValueError(f"BAR {bar.index} has no place")
        width = 8 if bar.is_64bit else 4
        flags = (BAR_64 if bar.is_64bit else 0) | (BAR_PREFETCHABLE if bar.prefetchable else 0)
        self.set(BASE_ADDRESS + 4 * bar.index, width, flags)
        self._allow(BASE_ADDRESS + 4 * bar.index, width, ~(bar.size_bytes - 1) & ((1 << (8 * width)) - 1))
        self._bars[bar.index] = bar
        self._at_reset = bytes(self._bytes)

    @property
    def bars(self) -> list[Bar]:
        """The BARs, by index."""
        return [self._bars[index] for index in sorted(self._bars)]

    def bar_address(self, index: int) -> int:
        """Where the driver or firmware put a BAR; 0 until then."""
        bar = self._bars[index]
        return self.get(BASE_ADDRESS + 4 * index, 8 if bar.is_64bit else 4) & ~(bar.size_bytes - 1)

    def place_bar(self, index: int, address: int) -> None:
        """Put a BAR somewhere, as firmware does before a driver runs. Survives `reset`."""
        bar = self._bars[index]
        if address & (bar.size_bytes - 1):
            raise ValueError(f"BAR {index} at {address:#x} is not aligned to its size")
        start, width = BASE_ADDRESS + 4 * index, 8 if bar.is_64bit else 4
        flags = self.get(start, 1) & 0xF
        self.set(start, width, address | flags)
        self._at_reset = bytes(self._bytes)

    def add_capability(self, cap_id: int, body: bytes, writable: bytes = b"") -> int:
        """Append a capability (6.7); `body` is what follows its id and next pointer. Returns its offset.

        writable: mask for the first bytes of `body`; the rest is read-only. Raises: ValueError when the space is full.
        """
        offset = self._free
        end = offset + 2 + len(body)
        if end > CONFIG_BYTES:
            raise ValueError("no room for another capability")
        self.set(self._last_link, 1, offset)
        self._bytes[offset : offset + 2] = bytes((cap_id, 0))
        self._bytes[offset + 2 : end] = body
        self._writable[offset + 2 : offset + 2 + len(writable)] = writable
        self.set(STATUS, 2, self.get(STATUS, 2) | STATUS_CAPABILITIES)
        self._last_link = offset + 1
        self._free = (end + 3) & ~3
        self._at_reset = bytes(self._bytes)
        return offset

    def read(self, offset: int, count: int) -> bytes:
        """What a read gives; zeros beyond the end."""
        return bytes(self._bytes[offset : offset + count]).ljust(count, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        """A write by the driver: only writable bits change."""
        before = bytes(self._bytes)
        for k, value in enumerate(data[: max(0, CONFIG_BYTES - offset)], offset):
            mask = self._writable[k]
            self._bytes[k] = (self._bytes[k] & ~mask) | (value & mask)
        if before != self._bytes:
            self.on_change()

    def reset(self) -> None:
        """As after power-on, BARs where firmware put them."""
        self._bytes[:] = self._at_reset
        self.on_change()
