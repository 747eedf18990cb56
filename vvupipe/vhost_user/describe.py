"""What a vhost-user message says: its name, its fields by name, and what its file descriptors are.

Source: QEMU docs/interop/vhost-user.rst, "Front-end message types" and "Back-end message types". Nothing here raises
on what a peer sent: a payload that does not fit its request is shown as it is, with the reason.
"""

from __future__ import annotations

import enum
import os
import struct
import uuid
from collections.abc import Callable, Iterable
from typing import Any

from vvupipe.errors import ProtocolError
from vvupipe.vhost_user.bit_names import FEATURES, PROTOCOL_FEATURES, STATUS, name_bits
from vvupipe.vhost_user.messages import BackendRequest, Message, Request
from vvupipe.vhost_user.payloads import (
    ACCESS_READ,
    ACCESS_WRITE,
    STATE_NO_FD,
    VRING_INDEX_MASK,
    VRING_NO_FD,
    ConfigAccess,
    InflightArea,
    IotlbEntry,
    IotlbType,
    LogArea,
    RegionEntry,
    StateDirection,
    StateTransfer,
    VringAddress,
    VringArea,
    VringState,
    unpack_memory_table,
    unpack_single_region,
    unpack_u64,
)

Fields = dict[str, Any]
_Decode = Callable[[Message], Fields]


class Side(enum.StrEnum):
    """Who sent a message."""

    FRONT_END = "front-end"
    BACK_END = "back-end"


class Hex(int):
    """A number that people read in hexadecimal."""

    def __str__(self) -> str:
        return f"{int(self):#x}"


def name_of(requester: Side, number: int) -> str:
    """The specification's name of a request; front-end and back-end count their own."""
    names: type[enum.IntEnum] = Request if requester is Side.FRONT_END else BackendRequest
    try:
        return names(number).name
    except ValueError:
        return f"request {number}"


def describe_request(requester: Side, message: Message) -> Fields:
    """The fields of a request; values are int, str, bool, bytes, Bits, lists or dicts of these."""
    requests = _FRONT_END if requester is Side.FRONT_END else _BACK_END
    decode, _ = requests.get(message.request, (_raw, _raw))
    return _decoded(decode, message)


def describe_reply(requester: Side, message: Message) -> Fields:
    """The fields of a reply to `requester`. "code" is there when it only tells success (0) or failure."""
    requests = _FRONT_END if requester is Side.FRONT_END else _BACK_END
    _, decode = requests.get(message.request, (_raw, _raw))
    return _decoded(decode, message)


def _decoded(decode: _Decode, message: Message) -> Fields:
    try:
        return decode(message)
    except ProtocolError as error:
        return {**_raw(message), "malformed": str(error)}


def describe_fd(fd: int) -> str:
    """What a file descriptor of this process is: eventfd, memfd:NAME, socket, a path."""
    try:
        target = os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return "closed"
    if target.startswith("anon_inode:"):
        return target.removeprefix("anon_inode:").strip("[]")
    if target.startswith("/memfd:"):
        return target[1:].removesuffix(" (deleted)")
    return target.split(":", 1)[0] if target.startswith(("socket:[", "pipe:[")) else target


def describe_fds(fds: Iterable[int]) -> list[str]:
    """`describe_fd` of each."""
    return [describe_fd(fd) for fd in fds]


# Payloads. Each raises ProtocolError only.


def _nothing(message: Message) -> Fields:
    return _raw(message)


def _raw(message: Message) -> Fields:
    return {"payload": message.payload} if message.payload else {}


def _ack(message: Message) -> Fields:
    return {"code": unpack_u64(message)}


def _u64(name: str) -> _Decode:
    return lambda message: {name: unpack_u64(message)}


def _features(message: Message) -> Fields:
    return {"features": name_bits(unpack_u64(message), FEATURES)}


def _protocol_features(message: Message) -> Fields:
    return {"features": name_bits(unpack_u64(message), PROTOCOL_FEATURES)}


def _status(message: Message) -> Fields:
    return {"status": name_bits(unpack_u64(message), STATUS)}


def _region(entry: RegionEntry) -> Fields:
    return {
        "gpa": Hex(entry.gpa),
        "size": Hex(entry.size_bytes),
        "uva": Hex(entry.uva),
        "offset": Hex(entry.mmap_offset),
    }


def _memory_table(message: Message) -> Fields:
    return {"regions": [_region(entry) for entry in unpack_memory_table(message)]}


def _memory_table_answer(message: Message) -> Fields:
    """REPLY_ACK's, or during postcopy the table with the back-end's own addresses."""
    return _ack(message) if len(message.payload) == _U64_BYTES else _memory_table(message)


def _single_region(message: Message) -> Fields:
    return _region(unpack_single_region(message))


def _log_area(message: Message) -> Fields:
    area = LogArea.unpack(message)
    return {"size": Hex(area.size_bytes), "offset": Hex(area.offset)}


def _log_answer(message: Message) -> Fields:
    """Some back-ends answer SET_LOG_BASE without a payload."""
    return _ack(message) if message.payload else {}


def _vring(name: str) -> _Decode:
    def decode(message: Message) -> Fields:
        state = VringState.unpack(message)
        return {"vring": state.index, name: state.num}

    return decode


def _vring_index(message: Message) -> Fields:
    return {"vring": VringState.unpack(message).index}


def _vring_address(message: Message) -> Fields:
    address = VringAddress.unpack(message)
    return {
        "vring": address.index,
        "flags": Hex(address.flags),
        "descriptor": Hex(address.descriptor_uva),
        "used": Hex(address.used_uva),
        "available": Hex(address.available_uva),
        "log": Hex(address.log_gpa),
    }


def _vring_fd(message: Message) -> Fields:
    value = unpack_u64(message)
    fields: Fields = {"vring": value & VRING_INDEX_MASK}
    if value & VRING_NO_FD:
        fields["no_fd"] = True
    if rest := value & ~(VRING_INDEX_MASK | VRING_NO_FD):
        fields["flags"] = Hex(rest)
    return fields


def _mac(message: Message) -> Fields:
    unpack_u64(message)
    return {"mac": message.payload[:6].hex(":")}


def _config_read(message: Message) -> Fields:
    """A request to read brings as many bytes as it wants, of no meaning."""
    access = ConfigAccess.unpack(message)
    return {"offset": access.offset, "size": access.size_bytes, **({"flags": access.flags} if access.flags else {})}


def _config(message: Message) -> Fields:
    if not message.payload:
        return {"failed": True}  # "Virtio device config space": a zero length tells that it failed
    access = ConfigAccess.unpack(message)
    return {**_config_read(message), "data": access.data}


def _iotlb(message: Message) -> Fields:
    entry = IotlbEntry.unpack(message)
    known = entry.kind in IotlbType._value2member_map_
    access = "".join(letter for letter, bit in (("r", ACCESS_READ), ("w", ACCESS_WRITE)) if entry.permissions & bit)
    return {
        "type": IotlbType(entry.kind).name if known else f"type {entry.kind}",
        "iova": Hex(entry.iova),
        "size": Hex(entry.size_bytes),
        "uva": Hex(entry.uva),
        "access": access or "none",
    }


def _inflight(message: Message) -> Fields:
    area = InflightArea.unpack(message)
    return {
        "size": Hex(area.size_bytes),
        "offset": Hex(area.offset),
        "num_queues": area.num_queues,
        "queue_size": area.queue_size,
    }


def _vring_area(message: Message) -> Fields:
    area = VringArea.unpack(message)
    return {
        "vring": area.index & VRING_INDEX_MASK,
        "flags": Hex(area.index & ~VRING_INDEX_MASK),
        "size": Hex(area.size_bytes),
        "offset": Hex(area.offset),
    }


def _state_transfer(message: Message) -> Fields:
    transfer = StateTransfer.unpack(message)
    known = transfer.direction in StateDirection._value2member_map_
    direction = StateDirection(transfer.direction).name if known else f"direction {transfer.direction}"
    return {"direction": direction, "phase": "STOPPED" if transfer.phase == 0 else f"phase {transfer.phase}"}


def _state_answer(message: Message) -> Fields:
    value = unpack_u64(message)
    return {"code": value & ~STATE_NO_FD, **({"no_fd": True} if value & STATE_NO_FD else {})}


def _shared_object(message: Message) -> Fields:
    if len(message.payload) != _UUID_BYTES:
        raise ProtocolError(f"{len(message.payload)} bytes of payload, expected the {_UUID_BYTES} of a UUID")
    return {"uuid": str(uuid.UUID(bytes=message.payload))}


def _shared_object_answer(message: Message) -> Fields:
    """The object comes as the fd."""
    return _ack(message) if len(message.payload) == _U64_BYTES else _raw(message)


def _shmem_config(message: Message) -> Fields:
    body = message.payload[_SHMEM_HEAD.size :]
    if len(message.payload) < _SHMEM_HEAD.size or len(body) % _U64_BYTES:
        raise ProtocolError(f"{len(message.payload)} bytes of payload in a list of shared memory regions")
    (count,) = _SHMEM_HEAD.unpack_from(message.payload)
    sizes = struct.unpack(f"={len(body) // _U64_BYTES}Q", body)
    return {
        "num_regions": count,
        "regions": [{"shmid": shmid, "size": Hex(size)} for shmid, size in enumerate(sizes) if size],
    }


def _shmem_map(message: Message) -> Fields:
    if len(message.payload) != _SHMEM_MAP.size:
        raise ProtocolError(f"{len(message.payload)} bytes of payload, expected {_SHMEM_MAP.size}")
    shmid, fd_offset, offset, size, flags = _SHMEM_MAP.unpack(message.payload)
    access = {0: "r", 1: "rw"}.get(flags, f"flags {flags:#x}")
    return {
        "shmid": shmid,
        "fd_offset": Hex(fd_offset),
        "shm_offset": Hex(offset),
        "size": Hex(size),
        "access": access,
    }


_U64_BYTES = 8
_UUID_BYTES = 16
_SHMEM_HEAD = struct.Struct("=I4x")  # "VIRTIO Shared Memory Region configuration"
_SHMEM_MAP = struct.Struct("=B7xQQQQ")  # "MMAP request"

#: Request: how to read it, how to read its reply.
_FRONT_END: dict[int, tuple[_Decode, _Decode]] = {
    Request.GET_FEATURES: (_nothing, _features),
    Request.SET_FEATURES: (_features, _ack),
    Request.SET_OWNER: (_nothing, _ack),
    Request.RESET_OWNER: (_nothing, _ack),
    Request.SET_MEM_TABLE: (_memory_table, _memory_table_answer),
    Request.SET_LOG_BASE: (_log_area, _log_answer),
    Request.SET_LOG_FD: (_nothing, _ack),
    Request.SET_VRING_NUM: (_vring("num"), _ack),
    Request.SET_VRING_ADDR: (_vring_address, _ack),
    Request.SET_VRING_BASE: (_vring("base"), _ack),
    Request.GET_VRING_BASE: (_vring_index, _vring("base")),
    Request.SET_VRING_KICK: (_vring_fd, _ack),
    Request.SET_VRING_CALL: (_vring_fd, _ack),
    Request.SET_VRING_ERR: (_vring_fd, _ack),
    Request.GET_PROTOCOL_FEATURES: (_nothing, _protocol_features),
    Request.SET_PROTOCOL_FEATURES: (_protocol_features, _ack),
    Request.GET_QUEUE_NUM: (_nothing, _u64("queues")),
    Request.SET_VRING_ENABLE: (_vring("enable"), _ack),
    Request.SEND_RARP: (_mac, _ack),
    Request.NET_SET_MTU: (_u64("mtu"), _ack),
    Request.SET_BACKEND_REQ_FD: (_nothing, _ack),
    Request.IOTLB_MSG: (_iotlb, _ack),
    Request.SET_VRING_ENDIAN: (_vring("big_endian"), _ack),
    Request.GET_CONFIG: (_config_read, _config),
    Request.SET_CONFIG: (_config, _ack),
    Request.CREATE_CRYPTO_SESSION: (_raw, _raw),
    Request.CLOSE_CRYPTO_SESSION: (_u64("session"), _ack),
    Request.POSTCOPY_ADVISE: (_nothing, _nothing),
    Request.POSTCOPY_LISTEN: (_nothing, _ack),
    Request.POSTCOPY_END: (_nothing, _ack),
    Request.GET_INFLIGHT_FD: (_inflight, _inflight),
    Request.SET_INFLIGHT_FD: (_inflight, _ack),
    Request.GPU_SET_SOCKET: (_nothing, _ack),
    Request.RESET_DEVICE: (_nothing, _ack),
    Request.VRING_KICK: (_vring_index, _ack),
    Request.GET_MAX_MEM_SLOTS: (_nothing, _u64("slots")),
    Request.ADD_MEM_REG: (_single_region, _ack),
    Request.REM_MEM_REG: (_single_region, _ack),
    Request.SET_STATUS: (_status, _ack),
    Request.GET_STATUS: (_nothing, _status),
    Request.GET_SHARED_OBJECT: (_shared_object, _shared_object_answer),
    Request.SET_DEVICE_STATE_FD: (_state_transfer, _state_answer),
    Request.CHECK_DEVICE_STATE: (_nothing, _ack),
    Request.GET_SHMEM_CONFIG: (_nothing, _shmem_config),
}

_BACK_END: dict[int, tuple[_Decode, _Decode]] = {
    BackendRequest.IOTLB_MSG: (_iotlb, _ack),
    BackendRequest.CONFIG_CHANGE_MSG: (_nothing, _ack),
    BackendRequest.VRING_HOST_NOTIFIER_MSG: (_vring_area, _ack),
    BackendRequest.VRING_CALL: (_vring_index, _ack),
    BackendRequest.VRING_ERR: (_vring_index, _ack),
    BackendRequest.SHARED_OBJECT_ADD: (_shared_object, _ack),
    BackendRequest.SHARED_OBJECT_REMOVE: (_shared_object, _ack),
    BackendRequest.SHARED_OBJECT_LOOKUP: (_shared_object, _shared_object_answer),
    BackendRequest.SHMEM_MAP: (_shmem_map, _ack),
    BackendRequest.SHMEM_UNMAP: (_shmem_map, _ack),
}
