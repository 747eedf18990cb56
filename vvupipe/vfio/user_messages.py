"""Layout of the vfio-user messages (QEMU docs/interop/vfio-user.rst) and of our extensions (docs/vvu.md).

All numbers are in the machine's byte order; offsets in the tables of the specification count from the end of the
header.
"""

from __future__ import annotations

import enum
import json
import struct
from dataclasses import dataclass
from typing import Any

from vvupipe.errors import ProtocolError

VERSION_MAJOR = 0
VERSION_MINOR = 1

HEADER = struct.Struct("=HHIII")  #: message id, command, size with header, flags, errno
TYPE_MASK = 0xF
TYPE_COMMAND = 0
TYPE_REPLY = 1
FLAG_NO_REPLY = 1 << 4
FLAG_ERROR = 1 << 5

DATA_TRANSFER_MAX = 1 << 20  #: default of "max_data_xfer_size", and ours
MESSAGE_MAX = HEADER.size + DATA_TRANSFER_MAX + 4096
MESSAGE_FDS_MAX = 253  #: what one message over a UNIX socket can carry on Linux


class Command(enum.IntEnum):
    """ "Commands"."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    DEVICE_GET_INFO = 4
    DEVICE_GET_REGION_INFO = 5
    DEVICE_GET_REGION_IO_FDS = 6
    DEVICE_GET_IRQ_INFO = 7
    DEVICE_SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DMA_READ = 11
    DMA_WRITE = 12
    DEVICE_RESET = 13
    REGION_WRITE_MULTI = 15
    DEVICE_FEATURE = 16
    MIG_DATA_READ = 17
    MIG_DATA_WRITE = 18


VERSION = struct.Struct("=HH")
DMA_MAP = struct.Struct("=IIQQQ")  #: argsz, flags, fd offset, address, size
DMA_READABLE = 1
DMA_WRITABLE = 2
DMA_UNMAP = struct.Struct("=IIQQ")  #: argsz, flags, address, size
DMA_UNMAP_ALL = 2  #: "unmap all", with address and size 0
DEVICE_INFO = struct.Struct("=IIII")  #: argsz, flags, num_regions, num_irqs
DEVICE_FLAGS_RESET = 1
DEVICE_FLAGS_PCI = 2
REGION_INFO = struct.Struct("=IIIIQQ")  #: argsz, flags, index, cap_offset, size, offset
REGION_READ_FLAG = 1
REGION_WRITE_FLAG = 2
REGION_MMAP_FLAG = 4
REGION_CAPS_FLAG = 8
CAP_HEADER = struct.Struct("=HHI")  #: id, version, offset of the next from the start of the region info
CAP_SPARSE_MMAP = 1  #: VFIO_REGION_INFO_CAP_SPARSE_MMAP
SPARSE_HEAD = struct.Struct("=II")  #: number of areas, reserved
SPARSE_AREA = struct.Struct("=QQ")  #: offset in the region, size
REGION_IO_FDS = struct.Struct("=IIII")  #: argsz, flags, index, count
IO_FD = struct.Struct("=QQIIIIQ")  #: offset, size, fd index, type, flags, padding, datamatch
IO_FD_IOEVENTFD = 0
IRQ_INFO = struct.Struct("=IIII")  #: argsz, flags, index, count
IRQ_EVENTFD = 1
IRQ_MASKABLE = 2
IRQ_SET = struct.Struct("=IIIII")  #: argsz, flags, index, start, count
IRQ_DATA_NONE = 1
IRQ_DATA_BOOL = 2
IRQ_DATA_EVENTFD = 4
IRQ_DATA_MASK = 7
IRQ_ACTION_MASK_IRQ = 8
IRQ_ACTION_UNMASK = 16
IRQ_ACTION_TRIGGER = 32
IRQ_ACTION_MASK = 56
REGION_ACCESS = struct.Struct("=QII")  #: offset, region, count
MULTI_HEAD = struct.Struct("=Q")  #: number of writes
MULTI_WRITE = struct.Struct("=QII8s")  #: offset, region, count, data

# Our extensions; both sides name them in the capabilities of VERSION.
EXTENSION = "vvupipe"  #: capability: an object with these members
EXTENSION_AREA_FDS = "area_fds"  #: one fd for each sparse area, told by the region capability below
EXTENSION_DOORBELL_FDS = "doorbell_fds"  #: GET_REGION_IO_FDS gives the sibling's eventfds
CAP_AREA_FDS = 0x7676
AREA_FD = struct.Struct("=IIQ")  #: fd index in the message, reserved, offset in that fd
BUSY_REPLY = struct.Struct("=I")  #: behind the header of an EBUSY reply to VERSION: the pid of the client in the way


@dataclass(frozen=True, slots=True)
class Header:
    """The header of every message; `size_bytes` counts itself."""

    message_id: int
    command: int
    size_bytes: int
    flags: int
    errno: int

    @classmethod
    def unpack(cls, data: bytes) -> Header:
        """Raises: ProtocolError on a size that cannot be."""
        header = cls(*HEADER.unpack(data))
        if not HEADER.size <= header.size_bytes <= MESSAGE_MAX:
            raise ProtocolError(f"vfio-user message of {header.size_bytes} bytes")
        return header

    @property
    def is_reply(self) -> bool:
        """Whether this is a reply."""
        return self.flags & TYPE_MASK == TYPE_REPLY


def pack_command(message_id: int, command: int, payload: bytes) -> bytes:
    """A command that wants a reply."""
    return HEADER.pack(message_id, command, HEADER.size + len(payload), TYPE_COMMAND, 0) + payload


def pack_reply(request: Header, payload: bytes) -> bytes:
    """The reply to a command."""
    return HEADER.pack(request.message_id, request.command, HEADER.size + len(payload), TYPE_REPLY, 0) + payload


def pack_error(request: Header, errno: int, payload: bytes = b"") -> bytes:
    """An error reply: a header alone, but for the busy reply of our extension."""
    size = HEADER.size + len(payload)
    return HEADER.pack(request.message_id, request.command, size, TYPE_REPLY | FLAG_ERROR, errno) + payload


def pack_version(capabilities: dict[str, Any], minor: int = VERSION_MINOR) -> bytes:
    """The payload of VERSION and of its reply."""
    text = json.dumps({"capabilities": capabilities}).encode()
    return VERSION.pack(VERSION_MAJOR, minor) + text + b"\0"


def unpack_version(payload: bytes) -> tuple[int, int, dict[str, Any]]:
    """(major, minor, capabilities). Raises: ProtocolError."""
    if len(payload) < VERSION.size:
        raise ProtocolError("VERSION without numbers")
    major, minor = VERSION.unpack_from(payload)
    text = payload[VERSION.size :].rstrip(b"\0")
    try:
        data = json.loads(text) if text else {}
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"VERSION with data that is not JSON: {error}") from error
    capabilities = data.get("capabilities", {}) if isinstance(data, dict) else None
    if not isinstance(capabilities, dict):
        raise ProtocolError("VERSION with data that is not an object")
    return major, minor, capabilities


def capability_number(capabilities: dict[str, Any], name: str, default: int) -> int:
    """A whole number from the capabilities. Raises: ProtocolError when it is something else."""
    value = capabilities.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ProtocolError(f"capability {name} is {value!r}")
    return value


def our_extensions(capabilities: dict[str, Any]) -> frozenset[str]:
    """Which of our extensions the capabilities name."""
    members = capabilities.get(EXTENSION)
    known = {EXTENSION_AREA_FDS, EXTENSION_DOORBELL_FDS}
    return frozenset(name for name in known if isinstance(members, dict) and members.get(name) is True)
