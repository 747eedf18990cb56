"""Layout of the vhost-user messages: header, request numbers, feature bits, payloads.

Source: QEMU docs/interop/vhost-user.rst, "Message Specification" and "Front-end message types". All numbers are in
the machine's byte order. `unpack` checks syntax only; what a message may mean at a moment is the session's business.
"""

from __future__ import annotations

import enum
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field

from vvupipe.errors import ProtocolError

VERSION = 0x1  #: "Header": the lower 2 bits of `flags`
VERSION_MASK = 0x3
FLAG_REPLY = 0x4
FLAG_NEED_REPLY = 0x8

HEADER = struct.Struct("=III")  #: request, flags, size of the payload
MAX_PAYLOAD = 4096 - HEADER.size  #: the largest payload in use is a 32-slot memory table; one page is ample
MAX_FDS = 8  #: "Memory regions description": at most 8 regions, one fd each
MAX_REGIONS = 8

VRING_INDEX_MASK = 0xFF  #: SET_VRING_KICK and its kin: bits 0-7 of the u64
VRING_NO_FD = 0x100  #: the same: bit 8, no fd is attached (polling, or no interrupt)


class Request(enum.IntEnum):
    """Requests of the front-end, in the order of their numbers ("Front-end message types")."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43
    GET_SHMEM_CONFIG = 44


class BackendRequest(enum.IntEnum):
    """Requests of the back-end, on the back-end channel ("Back-end message types")."""

    IOTLB_MSG = 1
    CONFIG_CHANGE_MSG = 2
    VRING_HOST_NOTIFIER_MSG = 3
    VRING_CALL = 4
    VRING_ERR = 5
    SHARED_OBJECT_ADD = 6
    SHARED_OBJECT_REMOVE = 7
    SHARED_OBJECT_LOOKUP = 8
    SHMEM_MAP = 9
    SHMEM_UNMAP = 10


#: Requests whose reply has a payload of its own; REPLY_ACK adds nothing to these ("Communication").
ANSWERED = frozenset(
    {
        Request.GET_FEATURES,
        Request.GET_PROTOCOL_FEATURES,
        Request.GET_VRING_BASE,
        Request.GET_QUEUE_NUM,
        Request.GET_CONFIG,
        Request.GET_MAX_MEM_SLOTS,
        Request.GET_STATUS,
        Request.GET_INFLIGHT_FD,
        Request.IOTLB_MSG,
        Request.POSTCOPY_ADVISE,
        Request.POSTCOPY_END,
        Request.CREATE_CRYPTO_SESSION,
        Request.GET_SHARED_OBJECT,
        Request.SET_DEVICE_STATE_FD,
        Request.CHECK_DEVICE_STATE,
        Request.GET_SHMEM_CONFIG,
    }
)


class ProtocolFeature(enum.IntFlag):
    """Protocol feature bits ("Protocol features")."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO_SESSION = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    XEN_MMAP = 1 << 17
    SHARED_OBJECT = 1 << 18
    DEVICE_STATE = 1 << 19
    GET_VRING_BASE_INFLIGHT = 1 << 20
    GPA_ADDRESSES = 1 << 21
    SHMEM_MAP = 1 << 22


#: What a front-end must have negotiated before it sends a request ("Protocol features", "Front-end message types").
NEEDED_FEATURE = {
    Request.GET_QUEUE_NUM: ProtocolFeature.MQ,
    Request.SET_LOG_BASE: ProtocolFeature.LOG_SHMFD,
    Request.SET_BACKEND_REQ_FD: ProtocolFeature.BACKEND_REQ,
    Request.GET_CONFIG: ProtocolFeature.CONFIG,
    Request.SET_CONFIG: ProtocolFeature.CONFIG,
    Request.POSTCOPY_ADVISE: ProtocolFeature.PAGEFAULT,
    Request.POSTCOPY_LISTEN: ProtocolFeature.PAGEFAULT,
    Request.POSTCOPY_END: ProtocolFeature.PAGEFAULT,
    Request.GET_INFLIGHT_FD: ProtocolFeature.INFLIGHT_SHMFD,
    Request.SET_INFLIGHT_FD: ProtocolFeature.INFLIGHT_SHMFD,
    Request.RESET_DEVICE: ProtocolFeature.RESET_DEVICE,
    Request.VRING_KICK: ProtocolFeature.INBAND_NOTIFICATIONS,
    Request.GET_MAX_MEM_SLOTS: ProtocolFeature.CONFIGURE_MEM_SLOTS,
    Request.ADD_MEM_REG: ProtocolFeature.CONFIGURE_MEM_SLOTS,
    Request.REM_MEM_REG: ProtocolFeature.CONFIGURE_MEM_SLOTS,
    Request.SET_STATUS: ProtocolFeature.STATUS,
    Request.GET_STATUS: ProtocolFeature.STATUS,
    Request.SET_DEVICE_STATE_FD: ProtocolFeature.DEVICE_STATE,
    Request.CHECK_DEVICE_STATE: ProtocolFeature.DEVICE_STATE,
}


F_PROTOCOL_FEATURES = 1 << 30  #: feature bit VHOST_USER_F_PROTOCOL_FEATURES
F_LOG_ALL = 1 << 26  #: feature bit VHOST_F_LOG_ALL ("Migration")
VRING_F_LOG = 1  #: VHOST_VRING_F_LOG, in the flags of SET_VRING_ADDR
LOG_PAGE_BYTES = 4096  #: VHOST_LOG_PAGE
CONFIG_FLAG_MIGRATION = 1  #: "Virtio device config space": flags of SET_CONFIG


@dataclass(slots=True)
class Message:
    """One vhost-user message, with the file descriptors that came or go with it.

    Whoever receives a message owns `fds`: take what you keep out with `take_fd`, then call `close_fds`.
    """

    request: int
    payload: bytes = b""
    flags: int = VERSION
    fds: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The specification's name of the request, or its number."""
        try:
            return Request(self.request).name
        except ValueError:
            return f"request {self.request}"

    @property
    def need_reply(self) -> bool:
        """Whether the sender set NEED_REPLY."""
        return bool(self.flags & FLAG_NEED_REPLY)

    @property
    def is_reply(self) -> bool:
        """Whether the REPLY flag is set."""
        return bool(self.flags & FLAG_REPLY)

    def reply(self, payload: bytes) -> Message:
        """The reply to this request, with `payload`."""
        return Message(self.request, payload, VERSION | FLAG_REPLY)

    def pack(self) -> bytes:
        """Header and payload as they go over the wire."""
        return HEADER.pack(self.request, self.flags, len(self.payload)) + self.payload

    def take_fd(self) -> int:
        """Hand over the first fd; the caller owns it now.

        Raises: ProtocolError when the message brought none.
        """
        if not self.fds:
            raise ProtocolError(f"{self.name} without the file descriptor that it needs")
        return self.fds.pop(0)

    def close_fds(self) -> None:
        """Close every fd that nobody took."""
        while self.fds:
            os.close(self.fds.pop())


def unpack_header(header: bytes) -> tuple[int, int, int]:
    """(request, flags, payload size) of a 12-byte header.

    Raises: ProtocolError on a wrong version or a payload larger than MAX_PAYLOAD.
    """
    request, flags, size = HEADER.unpack(header)
    if flags & VERSION_MASK != VERSION:
        raise ProtocolError(f"vhost-user version {flags & VERSION_MASK}, expected {VERSION}")
    if size > MAX_PAYLOAD:
        raise ProtocolError(f"payload of {size} bytes in request {request}, the limit is {MAX_PAYLOAD}")
    return request, flags, size


def unpack(data: bytes | memoryview) -> Message:
    """A whole message from `data` (as a VVU queue carries it).

    Raises: ProtocolError when header and length do not agree.
    """
    data = bytes(data)
    if len(data) < HEADER.size:
        raise ProtocolError(f"message of {len(data)} bytes is shorter than its header")
    request, flags, size = unpack_header(data[: HEADER.size])
    if len(data) != HEADER.size + size:
        raise ProtocolError(f"message of {len(data)} bytes, its header says {HEADER.size + size}")
    return Message(request, data[HEADER.size :], flags)


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
