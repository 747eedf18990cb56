"""What vhost-user messages carry, laid out as the specification has it.

Source: QEMU docs/interop/vhost-user.rst, "Message Specification". All numbers are in the machine's byte order. `unpack`
checks syntax only; what a payload may mean at a moment is the session's business.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from vvupipe.errors import ProtocolError
from vvupipe.vhost_user.messages import Message

MAX_REGIONS = 8
VRING_INDEX_MASK = 0xFF  #: SET_VRING_KICK and its kin: bits 0-7 of the u64
VRING_NO_FD = 0x100  #: the same: bit 8, no fd is attached (polling, or no interrupt)
VRING_F_LOG = 1  #: VHOST_VRING_F_LOG, in the flags of SET_VRING_ADDR
LOG_PAGE_BYTES = 4096  #: VHOST_LOG_PAGE
CONFIG_FLAG_MIGRATION = 1  #: "Virtio device config space": flags of SET_CONFIG


def _fields(layout: struct.Struct, message: Message) -> tuple[int, ...]:
    if len(message.payload) != layout.size:
        raise ProtocolError(f"{message.name} with {len(message.payload)} bytes of payload, expected {layout.size}")
    return layout.unpack(message.payload)


_U64 = struct.Struct("=Q")


def pack_u64(value: int) -> bytes:
    """ "A single 64-bit integer"."""
    return _U64.pack(value)


def unpack_u64(message: Message) -> int:
    """The message's 64-bit integer. Raises: ProtocolError on another payload size."""
    (value,) = _fields(_U64, message)
    return value


@dataclass(frozen=True, slots=True)
class VringState:
    """ "A vring state description"."""

    index: int
    num: int
    _LAYOUT = struct.Struct("=II")

    def pack(self) -> bytes:
        """The payload's bytes."""
        return self._LAYOUT.pack(self.index, self.num)

    @classmethod
    def unpack(cls, message: Message) -> VringState:
        """Raises: ProtocolError on another payload size."""
        return cls(*_fields(cls._LAYOUT, message))


@dataclass(frozen=True, slots=True)
class VringAddress:
    """ "A vring address description": the three parts of a ring as front-end user addresses."""

    index: int
    flags: int
    descriptor_uva: int
    used_uva: int
    available_uva: int
    log_gpa: int = 0
    _LAYOUT = struct.Struct("=IIQQQQ")

    def pack(self) -> bytes:
        """The payload's bytes."""
        return self._LAYOUT.pack(
            self.index, self.flags, self.descriptor_uva, self.used_uva, self.available_uva, self.log_gpa
        )

    @classmethod
    def unpack(cls, message: Message) -> VringAddress:
        """Raises: ProtocolError on another payload size."""
        return cls(*_fields(cls._LAYOUT, message))


@dataclass(frozen=True, slots=True)
class RegionEntry:
    """One region of "Memory regions description"; all four numbers are 64-bit."""

    gpa: int
    size_bytes: int
    uva: int
    mmap_offset: int
    LAYOUT = struct.Struct("=QQQQ")

    def pack(self) -> bytes:
        """The 32 bytes of one region."""
        return self.LAYOUT.pack(self.gpa, self.size_bytes, self.uva, self.mmap_offset)

    def check(self) -> None:
        """Raises: ProtocolError on an empty region or one that wraps the 64-bit address space."""
        limit = 1 << 64
        if not self.size_bytes or any(
            start + self.size_bytes > limit for start in (self.gpa, self.uva, self.mmap_offset)
        ):
            raise ProtocolError(f"memory region of {self.size_bytes:#x} bytes at {self.gpa:#x} is not possible")


_TABLE_HEAD = struct.Struct("=II")


def pack_memory_table(regions: Iterable[RegionEntry]) -> bytes:
    """The payload of SET_MEM_TABLE."""
    regions = list(regions)
    return _TABLE_HEAD.pack(len(regions), 0) + b"".join(region.pack() for region in regions)


def unpack_memory_table(message: Message) -> list[RegionEntry]:
    """The regions of SET_MEM_TABLE, checked one by one.

    Raises: ProtocolError on too many regions, a wrong size or an impossible region.
    """
    if len(message.payload) < _TABLE_HEAD.size:
        raise ProtocolError("memory table without a header")
    count, _ = _TABLE_HEAD.unpack_from(message.payload)
    if not 1 <= count <= MAX_REGIONS:
        raise ProtocolError(f"memory table of {count} regions, 1 to {MAX_REGIONS} are possible")
    body = message.payload[_TABLE_HEAD.size :]
    # Front-ends send either what is used or, as QEMU's union, room for all eight.
    if len(body) < count * RegionEntry.LAYOUT.size:
        raise ProtocolError(f"memory table of {count} regions in {len(body)} bytes")
    regions = [RegionEntry(*RegionEntry.LAYOUT.unpack_from(body, k * RegionEntry.LAYOUT.size)) for k in range(count)]
    for region in regions:
        region.check()
    return regions


@dataclass(frozen=True, slots=True)
class ConfigAccess:
    """ "Virtio device config space": `data` is as long as `size_bytes`."""

    offset: int
    size_bytes: int
    flags: int
    data: bytes
    _HEAD = struct.Struct("=III")

    def pack(self) -> bytes:
        """The payload's bytes."""
        return self._HEAD.pack(self.offset, self.size_bytes, self.flags) + self.data

    @classmethod
    def unpack(cls, message: Message) -> ConfigAccess:
        """Raises: ProtocolError when the payload is not as long as it says."""
        if len(message.payload) < cls._HEAD.size:
            raise ProtocolError(f"{message.name} without its header")
        offset, size_bytes, flags = cls._HEAD.unpack_from(message.payload)
        data = message.payload[cls._HEAD.size :]
        if len(data) != size_bytes:
            raise ProtocolError(f"{message.name} says {size_bytes} bytes and brings {len(data)}")
        return cls(offset, size_bytes, flags, data)


@dataclass(frozen=True, slots=True)
class LogArea:
    """ "Log description": where the dirty-page log is in the file that comes with SET_LOG_BASE."""

    size_bytes: int
    offset: int
    _LAYOUT = struct.Struct("=QQ")

    def pack(self) -> bytes:
        """The payload's bytes."""
        return self._LAYOUT.pack(self.size_bytes, self.offset)

    @classmethod
    def unpack(cls, message: Message) -> LogArea:
        """Raises: ProtocolError on another payload size, or an area that is empty or ends beyond any file."""
        area = cls(*_fields(cls._LAYOUT, message))
        if not area.size_bytes or area.size_bytes + area.offset >= 1 << 63:
            raise ProtocolError(f"a log of {area.size_bytes:#x} bytes at {area.offset:#x} is not possible")
        return area


class IotlbType(enum.IntEnum):
    """ "An IOTLB message": what it tells."""

    MISS = 1
    UPDATE = 2
    INVALIDATE = 3
    ACCESS_FAIL = 4


ACCESS_READ = 1  #: "An IOTLB message": permission flags
ACCESS_WRITE = 2


@dataclass(frozen=True, slots=True)
class IotlbEntry:
    """ "An IOTLB message", either way."""

    iova: int
    size_bytes: int
    uva: int
    permissions: int
    kind: int
    # As the kernel's struct vhost_iotlb_msg, whose size counts: six bytes of padding at the end.
    _LAYOUT = struct.Struct("=QQQBB6x")
    _SHORT = struct.Struct("=QQQBB")

    def pack(self) -> bytes:
        """The payload's bytes."""
        return self._LAYOUT.pack(self.iova, self.size_bytes, self.uva, self.permissions, self.kind)

    @classmethod
    def unpack(cls, message: Message) -> IotlbEntry:
        """With or without the padding. Raises: ProtocolError on another payload size."""
        short = len(message.payload) == cls._SHORT.size
        return cls(*_fields(cls._SHORT if short else cls._LAYOUT, message))


@dataclass(frozen=True, slots=True)
class InflightArea:
    """ "Inflight description"."""

    size_bytes: int
    offset: int
    num_queues: int
    queue_size: int
    # A C compiler pads it to 8 bytes, and QEMU compares the size of the answer; some peers send it unpadded.
    _LAYOUT = struct.Struct("=QQHH")
    _PADDED = struct.Struct("=QQHH4x")

    def pack(self) -> bytes:
        """The payload's bytes."""
        return self._PADDED.pack(self.size_bytes, self.offset, self.num_queues, self.queue_size)

    @classmethod
    def unpack(cls, message: Message) -> InflightArea:
        """Raises: ProtocolError on another payload size."""
        padded = len(message.payload) == cls._PADDED.size
        return cls(*_fields(cls._PADDED if padded else cls._LAYOUT, message))


@dataclass(frozen=True, slots=True)
class VringArea:
    """ "Vring area description"."""

    index: int
    size_bytes: int
    offset: int
    _LAYOUT = struct.Struct("=QQQ")

    @classmethod
    def unpack(cls, message: Message) -> VringArea:
        """Raises: ProtocolError on another payload size."""
        return cls(*_fields(cls._LAYOUT, message))


_SINGLE_HEAD = struct.Struct("=Q")


def pack_single_region(region: RegionEntry) -> bytes:
    """The payload of ADD_MEM_REG and REM_MEM_REG."""
    return _SINGLE_HEAD.pack(0) + region.pack()


def unpack_single_region(message: Message) -> RegionEntry:
    """The region of ADD_MEM_REG or REM_MEM_REG. Raises: ProtocolError on a wrong size or an impossible region."""
    if len(message.payload) != _SINGLE_HEAD.size + RegionEntry.LAYOUT.size:
        raise ProtocolError(f"{message.name} with {len(message.payload)} bytes of payload")
    region = RegionEntry(*RegionEntry.LAYOUT.unpack_from(message.payload, _SINGLE_HEAD.size))
    region.check()
    return region


class StateDirection(enum.IntEnum):
    """ "Device state transfer parameters": who writes."""

    SAVE = 0
    LOAD = 1


STATUS_MAX = 0xFF  #: SET_STATUS, GET_STATUS: the device status has 8 bits
STATE_PHASE_STOPPED = 0  #: the only phase that there is
STATE_NO_FD = 0x100  #: reply to SET_DEVICE_STATE_FD: bit 8, the front-end's fd is used


@dataclass(frozen=True, slots=True)
class StateTransfer:
    """ "Device state transfer parameters" of SET_DEVICE_STATE_FD."""

    direction: int
    phase: int
    _LAYOUT = struct.Struct("=II")

    def pack(self) -> bytes:
        """The payload's bytes."""
        return self._LAYOUT.pack(self.direction, self.phase)

    @classmethod
    def unpack(cls, message: Message) -> StateTransfer:
        """Raises: ProtocolError on another payload size."""
        return cls(*_fields(cls._LAYOUT, message))
