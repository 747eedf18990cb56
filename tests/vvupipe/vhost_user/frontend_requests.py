"""Every request of the front-end as it must be on the wire, encoded with `struct`; tests go through these tables."""

import struct
from dataclasses import dataclass

from tests.mock import frontend as wire
from tests.vvupipe.vhost_user.frontend_kit import PAGEFAULT
from vvupipe.memory.region import MemoryRegion
from vvupipe.vhost_user.frontend_vrings import InflightRegion
from vvupipe.vhost_user.messages import ProtocolFeature
from vvupipe.vhost_user.payloads import InflightArea, StateDirection
from vvupipe.vhost_user.transport import FileArea

UVA = 0x7F00_0000_0000


def u64(value):
    return struct.pack("=Q", value)


def u32s(*values):
    return struct.pack(f"={len(values)}I", *values)


def region(fd, gpa=0x10_0000):
    return MemoryRegion(gpa, 0x8000, UVA + gpa, fd, 0x1000)


REGION = struct.pack("=QQQQ", 0x10_0000, 0x8000, UVA + 0x10_0000, 0x1000)
OTHER_REGION = struct.pack("=QQQQ", 0x20_0000, 0x8000, UVA + 0x20_0000, 0x1000)
ADDRESS = {"descriptor_uva": UVA + 1, "available_uva": UVA + 2, "used_uva": UVA + 3}


@dataclass(frozen=True)
class Case:
    """A request: how it is made of files a and b, what it must be on the wire, which protocol feature it needs."""

    request: int
    make: object
    payload: bytes = b""
    files: str = ""
    needs: int = 0
    answer: bytes = b""
    result: object = None


#: Requests without an answer of their own.
TOLD = {
    "SET_OWNER": Case(3, lambda fe, a, b: fe.set_owner()),
    "RESET_OWNER": Case(4, lambda fe, a, b: fe.reset_owner()),
    "SET_FEATURES": Case(2, lambda fe, a, b: fe.set_features(1 << 32), u64(1 << 32 | 1 << 30)),
    "SET_MEM_TABLE": Case(
        5,
        lambda fe, a, b: fe.set_memory_table([region(a), region(b, 0x20_0000)]),
        u32s(2, 0) + REGION + OTHER_REGION,
        "ab",
    ),
    "SET_LOG_FD": Case(7, lambda fe, a, b: fe.set_log_fd(a), b"", "a"),
    "SET_VRING_NUM": Case(8, lambda fe, a, b: fe.set_vring_num(3, 128), u32s(3, 128)),
    "SET_VRING_ADDR": Case(
        9,
        lambda fe, a, b: fe.set_vring_addr(3, **ADDRESS),
        struct.pack("=IIQQQQ", 3, 0, UVA + 1, UVA + 3, UVA + 2, 0),
    ),
    "SET_VRING_ADDR with a log": Case(
        9,
        lambda fe, a, b: fe.set_vring_addr(3, **ADDRESS, log_gpa=0x5000),
        struct.pack("=IIQQQQ", 3, 1, UVA + 1, UVA + 3, UVA + 2, 0x5000),
    ),
    "SET_VRING_BASE": Case(10, lambda fe, a, b: fe.set_vring_base(3, 77), u32s(3, 77)),
    "SET_VRING_KICK": Case(12, lambda fe, a, b: fe.set_vring_kick(3, b), u64(3), "b"),
    "SET_VRING_KICK without fd": Case(12, lambda fe, a, b: fe.set_vring_kick(3, None), u64(0x103)),
    "SET_VRING_CALL": Case(13, lambda fe, a, b: fe.set_vring_call(255, a), u64(255), "a"),
    "SET_VRING_CALL without fd": Case(13, lambda fe, a, b: fe.set_vring_call(255, None), u64(0x1FF)),
    "SET_VRING_ERR": Case(14, lambda fe, a, b: fe.set_vring_err(3, a), u64(3), "a"),
    "SET_VRING_ERR without fd": Case(14, lambda fe, a, b: fe.set_vring_err(3, None), u64(0x103)),
    "SET_VRING_ENABLE": Case(18, lambda fe, a, b: fe.set_vring_enable(3, True), u32s(3, 1)),
    "SET_VRING_ENABLE off": Case(18, lambda fe, a, b: fe.set_vring_enable(3, False), u32s(3, 0)),
    "SET_CONFIG": Case(25, lambda fe, a, b: fe.set_config(32, b"\1"), u32s(32, 1, 0) + b"\1", needs=wire.CONFIG),
    "SET_CONFIG of a migration": Case(
        25, lambda fe, a, b: fe.set_config(0, b"abc", migration=True), u32s(0, 3, 1) + b"abc", needs=wire.CONFIG
    ),
    "POSTCOPY_LISTEN": Case(29, lambda fe, a, b: fe.postcopy_listen(), needs=PAGEFAULT),
    "SET_INFLIGHT_FD": Case(
        32,
        lambda fe, a, b: fe.set_inflight(InflightRegion(InflightArea(640, 64, 2, 16), a)),
        struct.pack("=QQHH4x", 640, 64, 2, 16),
        "a",
        wire.INFLIGHT_SHMFD,
    ),
    "RESET_DEVICE": Case(34, lambda fe, a, b: fe.reset_device(), needs=wire.RESET_DEVICE_F),
    "VRING_KICK": Case(35, lambda fe, a, b: fe.vring_kick(3), u32s(3, 0), needs=wire.INBAND),
    "ADD_MEM_REG": Case(37, lambda fe, a, b: fe.add_mem_reg(region(a)), u64(0) + REGION, "a", wire.MEM_SLOTS),
    "REM_MEM_REG": Case(38, lambda fe, a, b: fe.rem_mem_reg(region(a)), u64(0) + REGION, "", wire.MEM_SLOTS),
    "SET_STATUS": Case(39, lambda fe, a, b: fe.set_status(15), u64(15), needs=wire.STATUS),
}

SPACE = u32s(8, 4, 0)

#: Requests with an answer of their own that brings no fd.
ASKED = {
    "GET_FEATURES": Case(1, lambda fe, a, b: fe.get_features(), answer=u64(5), result=5),
    "SET_LOG_BASE": Case(
        6,
        lambda fe, a, b: fe.set_log_base(FileArea(a, 4096, 64)),
        struct.pack("=QQ", 4096, 64),
        "a",
        wire.LOG_SHMFD,
        u64(4096),
        4096,
    ),
    "GET_VRING_BASE": Case(11, lambda fe, a, b: fe.get_vring_base(3), u32s(3, 0), answer=u32s(3, 65535), result=65535),
    "GET_PROTOCOL_FEATURES": Case(
        15, lambda fe, a, b: fe.get_protocol_features(), answer=u64(9), result=ProtocolFeature(9)
    ),
    "GET_QUEUE_NUM": Case(17, lambda fe, a, b: fe.get_queue_num(), answer=u64(4), result=4),
    "IOTLB_MSG update": Case(
        22,
        lambda fe, a, b: fe.update_iotlb(0x4000, 0x1000, UVA, 3),
        struct.pack("=QQQBB6x", 0x4000, 0x1000, UVA, 3, 2),
        answer=u64(0),
    ),
    "IOTLB_MSG invalidate": Case(
        22,
        lambda fe, a, b: fe.invalidate_iotlb(0x4000, 0x1000),
        struct.pack("=QQQBB6x", 0x4000, 0x1000, 0, 0, 3),
        answer=u64(0),
    ),
    "GET_CONFIG": Case(
        24,
        lambda fe, a, b: fe.get_config(8, 4),
        SPACE + bytes(4),
        needs=wire.CONFIG,
        answer=SPACE + b"abcd",
        result=b"abcd",
    ),
    "POSTCOPY_END": Case(30, lambda fe, a, b: fe.postcopy_end(), needs=PAGEFAULT, answer=u64(0)),
    "GET_MAX_MEM_SLOTS": Case(
        36, lambda fe, a, b: fe.get_max_mem_slots(), needs=wire.MEM_SLOTS, answer=u64(32), result=32
    ),
    "GET_STATUS": Case(40, lambda fe, a, b: fe.get_status(), needs=wire.STATUS, answer=u64(255), result=255),
    "CHECK_DEVICE_STATE": Case(43, lambda fe, a, b: fe.check_device_state(), needs=wire.DEVICE_STATE, answer=u64(0)),
}


#: Requests whose answer may bring an fd.
def get_inflight(fe, a, b):
    return fe.get_inflight(2, 16)


def set_device_state_fd(fe, a, b):
    return fe.set_device_state_fd(StateDirection.LOAD, a)


INFLIGHT = struct.pack("=QQHH4x", 0, 0, 2, 16)
WITH_FD = {
    "POSTCOPY_ADVISE": Case(28, lambda fe, a, b: fe.postcopy_advise(), needs=PAGEFAULT),
    "GET_INFLIGHT_FD": Case(
        31, get_inflight, INFLIGHT, needs=wire.INFLIGHT_SHMFD, answer=struct.pack("=QQHH4x", 640, 64, 2, 16)
    ),
    "SET_DEVICE_STATE_FD": Case(42, set_device_state_fd, u32s(1, 0), "a", wire.DEVICE_STATE, u64(0)),
}
ALL = TOLD | ASKED | WITH_FD
