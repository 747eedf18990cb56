"""The vhost-user messages: header, request numbers, feature bits. What they carry is in `payloads`.

Source: QEMU docs/interop/vhost-user.rst, "Message Specification" and "Front-end message types". All numbers are in
the machine's byte order. `unpack` checks syntax only; what a message may mean at a moment is the session's business.
"""

from __future__ import annotations

import enum
import os
import struct
from dataclasses import dataclass, field

from vvupipe.errors import ProtocolError

VERSION = 0x1  #: "Header": the lower 2 bits of `flags`
VERSION_MASK = 0x3
FLAG_REPLY = 0x4
FLAG_NEED_REPLY = 0x8

HEADER = struct.Struct("=III")  #: request, flags, size of the payload
MAX_PAYLOAD = 4096 - HEADER.size  #: the largest payload in use is a 32-slot memory table; one page is ample
MAX_FDS = 8  #: "Memory regions description": at most 8 regions, one fd each


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


IN_BAND_NEEDS = ProtocolFeature.BACKEND_REQ | ProtocolFeature.REPLY_ACK  #: "In-band notifications"
F_PROTOCOL_FEATURES = 1 << 30  #: feature bit VHOST_USER_F_PROTOCOL_FEATURES
F_LOG_ALL = 1 << 26  #: feature bit VHOST_F_LOG_ALL ("Migration")


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
