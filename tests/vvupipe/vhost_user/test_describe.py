"""Every message by its name and fields, and nothing that a peer sends makes the description fail."""

import os
import random
import socket
import struct

import pytest

from vvupipe.vhost_user.bit_names import Bits
from vvupipe.vhost_user.describe import Side, describe_fd, describe_reply, describe_request, name_of
from vvupipe.vhost_user.messages import BackendRequest, Message, Request

U64 = struct.Struct("=Q")
REGION = struct.pack("=QQQQ", 0x1000, 0x2000, 0x7F00, 0x10)
REGION_FIELDS = {"gpa": 0x1000, "size": 0x2000, "uva": 0x7F00, "offset": 0x10}
CONFIG = struct.pack("=III", 8, 4, 0) + b"\1\2\3\4"
IOTLB = struct.pack("=QQQBB6x", 0x4000, 0x1000, 0x7F00, 3, 2)
IOTLB_FIELDS = {"type": "UPDATE", "iova": 0x4000, "size": 0x1000, "uva": 0x7F00, "access": "rw"}
INFLIGHT = struct.pack("=QQHH4x", 0x440, 0, 2, 64)
INFLIGHT_FIELDS = {"size": 0x440, "offset": 0, "num_queues": 2, "queue_size": 64}
UUID = bytes(range(16))
UUID_FIELDS = {"uuid": "00010203-0405-0607-0809-0a0b0c0d0e0f"}
MAP = struct.pack("=B7xQQQQ", 5, 0x1000, 0x2000, 0x3000, 1)
MAP_FIELDS = {"shmid": 5, "fd_offset": 0x1000, "shm_offset": 0x2000, "size": 0x3000, "access": "rw"}
STATE = struct.pack("=II", 3, 256)
DONE = (U64.pack(0), {"code": 0})
FEATURES = (U64.pack(1 << 32 | 1 << 9 | 1 << 50), {"features": ("BLK_F_FLUSH", "F_VERSION_1", "bit 50")})
PROTOCOL = (U64.pack(0b1001), {"features": ("MQ", "REPLY_ACK")})
STATUS = (U64.pack(0x8F), {"status": ("ACKNOWLEDGE", "DRIVER", "DRIVER_OK", "FEATURES_OK", "FAILED")})
NOTHING = (b"", {})

#: request: its payload and fields, its reply's payload and fields
FRONT_END = {
    "GET_FEATURES": (NOTHING, FEATURES),
    "SET_FEATURES": (FEATURES, DONE),
    "SET_OWNER": (NOTHING, DONE),
    "RESET_OWNER": (NOTHING, DONE),
    "SET_MEM_TABLE": ((struct.pack("=II", 2, 0) + REGION * 2, {"regions": [REGION_FIELDS] * 2}), DONE),
    "SET_LOG_BASE": ((struct.pack("=QQ", 4096, 64), {"size": 4096, "offset": 64}), DONE),
    "SET_LOG_FD": (NOTHING, DONE),
    "SET_VRING_NUM": ((STATE, {"vring": 3, "num": 256}), DONE),
    "SET_VRING_ADDR": (
        (
            struct.pack("=IIQQQQ", 1, 1, 0x10, 0x20, 0x30, 0x40),
            {"vring": 1, "flags": 1, "descriptor": 0x10, "used": 0x20, "available": 0x30, "log": 0x40},
        ),
        DONE,
    ),
    "SET_VRING_BASE": ((STATE, {"vring": 3, "base": 256}), DONE),
    "GET_VRING_BASE": ((STATE, {"vring": 3}), (STATE, {"vring": 3, "base": 256})),
    "SET_VRING_KICK": ((U64.pack(0x102), {"vring": 2, "no_fd": True}), DONE),
    "SET_VRING_CALL": ((U64.pack(2), {"vring": 2}), DONE),
    "SET_VRING_ERR": ((U64.pack(0x1002), {"vring": 2, "flags": 0x1000}), DONE),
    "GET_PROTOCOL_FEATURES": (NOTHING, PROTOCOL),
    "SET_PROTOCOL_FEATURES": (PROTOCOL, DONE),
    "GET_QUEUE_NUM": (NOTHING, (U64.pack(16), {"queues": 16})),
    "SET_VRING_ENABLE": ((STATE, {"vring": 3, "enable": 256}), DONE),
    "SEND_RARP": ((b"\x52\x54\0\1\2\3\0\0", {"mac": "52:54:00:01:02:03"}), DONE),
    "NET_SET_MTU": ((U64.pack(1500), {"mtu": 1500}), DONE),
    "SET_BACKEND_REQ_FD": (NOTHING, DONE),
    "IOTLB_MSG": ((IOTLB, IOTLB_FIELDS), DONE),
    "SET_VRING_ENDIAN": ((STATE, {"vring": 3, "big_endian": 256}), DONE),
    "GET_CONFIG": (
        (CONFIG, {"offset": 8, "size": 4}),
        (CONFIG, {"offset": 8, "size": 4, "data": b"\1\2\3\4"}),
    ),
    "SET_CONFIG": ((CONFIG, {"offset": 8, "size": 4, "data": b"\1\2\3\4"}), DONE),
    "CREATE_CRYPTO_SESSION": ((b"abc", {"payload": b"abc"}), (b"abcd", {"payload": b"abcd"})),
    "CLOSE_CRYPTO_SESSION": ((U64.pack(9), {"session": 9}), DONE),
    "POSTCOPY_ADVISE": (NOTHING, NOTHING),
    "POSTCOPY_LISTEN": (NOTHING, DONE),
    "POSTCOPY_END": (NOTHING, DONE),
    "GET_INFLIGHT_FD": ((INFLIGHT, INFLIGHT_FIELDS), (INFLIGHT[:20], INFLIGHT_FIELDS)),
    "SET_INFLIGHT_FD": ((INFLIGHT, INFLIGHT_FIELDS), DONE),
    "GPU_SET_SOCKET": (NOTHING, DONE),
    "RESET_DEVICE": (NOTHING, DONE),
    "VRING_KICK": ((STATE, {"vring": 3}), DONE),
    "GET_MAX_MEM_SLOTS": (NOTHING, (U64.pack(509), {"slots": 509})),
    "ADD_MEM_REG": ((bytes(8) + REGION, REGION_FIELDS), DONE),
    "REM_MEM_REG": ((bytes(8) + REGION, REGION_FIELDS), DONE),
    "SET_STATUS": (STATUS, DONE),
    "GET_STATUS": (NOTHING, STATUS),
    "GET_SHARED_OBJECT": ((UUID, UUID_FIELDS), DONE),
    "SET_DEVICE_STATE_FD": (
        (struct.pack("=II", 1, 0), {"direction": "LOAD", "phase": "STOPPED"}),
        (U64.pack(0x100), {"code": 0, "no_fd": True}),
    ),
    "CHECK_DEVICE_STATE": (NOTHING, (U64.pack(1), {"code": 1})),
    "GET_SHMEM_CONFIG": (
        NOTHING,
        (
            struct.pack("=II3Q", 2, 0, 0x1000, 0, 0x3000),
            {"num_regions": 2, "regions": [{"shmid": 0, "size": 0x1000}, {"shmid": 2, "size": 0x3000}]},
        ),
    ),
}
BACK_END = {
    "IOTLB_MSG": ((struct.pack("=QQQBB", 0x4000, 0, 0, 1, 1), {**IOTLB_FIELDS, "type": "MISS", "size": 0, "uva": 0,
                                                               "access": "r"}), DONE),
    "CONFIG_CHANGE_MSG": (NOTHING, DONE),
    "VRING_HOST_NOTIFIER_MSG": (
        (struct.pack("=QQQ", 0x102, 4096, 0), {"vring": 2, "flags": 0x100, "size": 4096, "offset": 0}),
        DONE,
    ),
    "VRING_CALL": ((STATE, {"vring": 3}), DONE),
    "VRING_ERR": ((STATE, {"vring": 3}), DONE),
    "SHARED_OBJECT_ADD": ((UUID, UUID_FIELDS), DONE),
    "SHARED_OBJECT_REMOVE": ((UUID, UUID_FIELDS), DONE),
    "SHARED_OBJECT_LOOKUP": ((UUID, UUID_FIELDS), DONE),
    "SHMEM_MAP": ((MAP, MAP_FIELDS), DONE),
    "SHMEM_UNMAP": ((MAP, MAP_FIELDS), DONE),
}  # fmt: skip


def plain(fields):
    return {name: value.names if isinstance(value, Bits) else value for name, value in fields.items()}


@pytest.mark.parametrize(
    ("side", "request_", "expected"),
    [(Side.FRONT_END, Request[name], case) for name, case in FRONT_END.items()]
    + [(Side.BACK_END, BackendRequest[name], case) for name, case in BACK_END.items()],
    ids=lambda value: getattr(value, "name", None),
)
def test_every_message(side, request_, expected):
    assert name_of(side, request_) == request_.name
    for describe, (payload, fields) in zip((describe_request, describe_reply), expected, strict=True):
        assert plain(describe(side, Message(request_, payload))) == fields


def test_no_message_is_missing():
    assert list(FRONT_END) == [request.name for request in Request]
    assert [request.value for request in Request] == list(range(1, 45))
    assert list(BACK_END) == [request.name for request in BackendRequest]


@pytest.mark.parametrize("side", list(Side))
def test_hostile_payloads_are_shown_as_they_are(side):
    chance = random.Random(4)
    # One more than any that is known, and the largest that there is.
    for number in [*range(47), 0xFFFFFFFF]:
        for size in [*range(60), 64, 264, 4084]:
            payload = chance.randbytes(size)
            for describe in (describe_request, describe_reply):
                fields = describe(side, Message(number, payload))
                if "malformed" in fields:
                    assert fields.get("payload", b"") == payload
                assert str(fields)


def test_unknown_request():
    assert name_of(Side.FRONT_END, 99) == "request 99"
    assert describe_request(Side.FRONT_END, Message(99, b"\xab\xcd")) == {"payload": b"\xab\xcd"}
    assert name_of(Side.BACK_END, 11) == "request 11"


def test_malformed_says_why():
    fields = describe_request(Side.FRONT_END, Message(Request.SET_MEM_TABLE, struct.pack("=II", 9, 0)))
    assert "memory table of 9 regions" in fields["malformed"]
    assert describe_reply(Side.FRONT_END, Message(Request.GET_CONFIG)) == {"failed": True}
    fields = describe_request(Side.FRONT_END, Message(Request.SET_OWNER, b"x"))
    assert fields == {"payload": b"x"}


def test_postcopy_answers_the_memory_table_with_a_table():
    table = struct.pack("=II", 1, 0) + REGION
    assert describe_reply(Side.FRONT_END, Message(Request.SET_MEM_TABLE, table)) == {"regions": [REGION_FIELDS]}


def test_file_descriptors(tmp_path):
    path = tmp_path / "image"
    fds = [os.eventfd(0), os.memfd_create("guest ram"), os.open(path, os.O_CREAT | os.O_RDWR), *os.pipe()]
    with socket.socket(socket.AF_UNIX) as sock:
        assert [describe_fd(fd) for fd in [*fds, sock.fileno()]] == [
            "eventfd", "memfd:guest ram", str(path), "pipe", "pipe", "socket",
        ]  # fmt: skip
    for fd in fds:
        os.close(fd)
    assert describe_fd(fds[0]) == "closed"
