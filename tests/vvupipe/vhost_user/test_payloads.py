"""Layouts of payloads against an encoding of their own (struct), and what is refused."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vvupipe.errors import ProtocolError
from vvupipe.vhost_user.messages import Message
from vvupipe.vhost_user.payloads import (
    ConfigAccess,
    InflightArea,
    IotlbEntry,
    LogArea,
    RegionEntry,
    StateTransfer,
    VringAddress,
    VringState,
    pack_memory_table,
    pack_single_region,
    unpack_memory_table,
    unpack_single_region,
    unpack_u64,
)

U8, U16 = st.integers(0, 0xFF), st.integers(0, 0xFFFF)
U32, U64 = st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)


@given(index=U32, num=U32)
def test_vring_state(index, num):
    payload = VringState(index, num).pack()
    assert payload == struct.pack("=II", index, num)
    assert VringState.unpack(Message(8, payload)) == VringState(index, num)


@given(st.tuples(U32, U32, U64, U64, U64, U64))
def test_vring_address(fields):
    payload = VringAddress(*fields).pack()
    assert payload == struct.pack("=IIQQQQ", *fields)
    assert VringAddress.unpack(Message(9, payload)) == VringAddress(*fields)


@given(st.lists(st.tuples(U64, U64, U64, U64), min_size=1, max_size=8))
def test_memory_table(rows):
    payload = struct.pack("=II", len(rows), 0) + b"".join(struct.pack("=QQQQ", *row) for row in rows)
    possible = all(size and max(gpa, uva, offset) + size <= 1 << 64 for gpa, size, uva, offset in rows)
    if not possible:
        with pytest.raises(ProtocolError):
            unpack_memory_table(Message(5, payload))
        return
    entries = unpack_memory_table(Message(5, payload))
    assert [(e.gpa, e.size_bytes, e.uva, e.mmap_offset) for e in entries] == rows
    assert pack_memory_table(entries) == payload


def test_memory_table_with_room_for_eight_is_accepted():
    payload = struct.pack("=IIQQQQ", 1, 0, 0, 4096, 0, 0) + bytes(7 * 32)
    assert len(unpack_memory_table(Message(5, payload))) == 1


@pytest.mark.parametrize("payload", [b"", struct.pack("=II", 0, 0), struct.pack("=II", 9, 0) + bytes(9 * 32)])
def test_memory_tables_that_are_none(payload):
    with pytest.raises(ProtocolError):
        unpack_memory_table(Message(5, payload))


@given(offset=U32, data=st.binary(max_size=64), flags=U32)
def test_config_access(offset, data, flags):
    access = ConfigAccess(offset, len(data), flags, data)
    assert access.pack() == struct.pack("=III", offset, len(data), flags) + data
    assert ConfigAccess.unpack(Message(24, access.pack())) == access


def test_config_access_that_lies_about_its_size():
    with pytest.raises(ProtocolError):
        ConfigAccess.unpack(Message(24, struct.pack("=III", 0, 8, 0) + bytes(4)))


@pytest.mark.parametrize("size", [0, 4, 12])
def test_u64_of_another_size(size):
    with pytest.raises(ProtocolError):
        unpack_u64(Message(2, bytes(size)))


@given(gpa=U32, size=st.integers(1, 1 << 32), uva=U32, offset=U32)
def test_single_region(gpa, size, uva, offset):
    region = RegionEntry(gpa, size, uva, offset)
    payload = pack_single_region(region)
    assert payload == struct.pack("=QQQQQ", 0, gpa, size, uva, offset)
    assert unpack_single_region(Message(37, payload)) == region


@given(size=st.integers(1, 1 << 62), offset=st.integers(0, 1 << 61))
def test_log_area(size, offset):
    payload = LogArea(size, offset).pack()
    assert payload == struct.pack("=QQ", size, offset)
    assert LogArea.unpack(Message(6, payload)) == LogArea(size, offset)


@pytest.mark.parametrize(
    "payload", [bytes(16), bytes(8), struct.pack("=QQ", 1 << 63, 0), struct.pack("=QQ", 1, 1 << 63)]
)
def test_log_areas_that_are_none(payload):
    with pytest.raises(ProtocolError):
        LogArea.unpack(Message(6, payload))


@given(st.tuples(U64, U64, U64, U8, U8))
def test_iotlb_entry_with_padding_and_without(fields):
    payload = IotlbEntry(*fields).pack()
    assert payload == struct.pack("=QQQBB", *fields) + bytes(6)
    for received in (payload, payload[:26]):
        assert IotlbEntry.unpack(Message(22, received)) == IotlbEntry(*fields)
    with pytest.raises(ProtocolError):
        IotlbEntry.unpack(Message(22, payload[:27]))


@given(st.tuples(U64, U64, U16, U16))
def test_inflight_area_with_padding_and_without(fields):
    payload = InflightArea(*fields).pack()
    assert payload == struct.pack("=QQHH", *fields) + bytes(4)
    for received in (payload, payload[:20]):
        assert InflightArea.unpack(Message(31, received)) == InflightArea(*fields)
    with pytest.raises(ProtocolError):
        InflightArea.unpack(Message(31, payload[:21]))


@given(direction=U32, phase=U32)
def test_state_transfer(direction, phase):
    transfer = StateTransfer.unpack(Message(42, struct.pack("=II", direction, phase)))
    assert (transfer.direction, transfer.phase) == (direction, phase)
