"""Message layouts against an encoding of their own (struct), and what is refused."""

import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vvupipe.errors import ProtocolError
from vvupipe.vhost_user import messages as wire

U32, U64 = st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)


@given(request=U32, payload=st.binary(max_size=300))
def test_message_round_trip(request, payload):
    data = wire.Message(request, payload).pack()
    assert data == struct.pack("=III", request, 1, len(payload)) + payload
    back = wire.unpack(data)
    assert (back.request, back.payload, back.flags) == (request, payload, 1)


@given(data=st.binary(max_size=64))
def test_any_bytes_are_a_message_or_refused(data):
    try:
        message = wire.unpack(data)
    except ProtocolError:
        return
    assert message.pack() == data


@given(index=U32, num=U32)
def test_vring_state(index, num):
    payload = wire.VringState(index, num).pack()
    assert payload == struct.pack("=II", index, num)
    assert wire.VringState.unpack(wire.Message(8, payload)) == wire.VringState(index, num)


@given(st.tuples(U32, U32, U64, U64, U64, U64))
def test_vring_address(fields):
    payload = wire.VringAddress(*fields).pack()
    assert payload == struct.pack("=IIQQQQ", *fields)
    assert wire.VringAddress.unpack(wire.Message(9, payload)) == wire.VringAddress(*fields)


@given(st.lists(st.tuples(U64, U64, U64, U64), min_size=1, max_size=8))
def test_memory_table(rows):
    payload = struct.pack("=II", len(rows), 0) + b"".join(struct.pack("=QQQQ", *row) for row in rows)
    possible = all(size and max(gpa, uva, offset) + size <= 1 << 64 for gpa, size, uva, offset in rows)
    if not possible:
        with pytest.raises(ProtocolError):
            wire.unpack_memory_table(wire.Message(5, payload))
        return
    entries = wire.unpack_memory_table(wire.Message(5, payload))
    assert [(e.gpa, e.size_bytes, e.uva, e.mmap_offset) for e in entries] == rows
    assert wire.pack_memory_table(entries) == payload


def test_memory_table_with_room_for_eight_is_accepted():
    payload = struct.pack("=IIQQQQ", 1, 0, 0, 4096, 0, 0) + bytes(7 * 32)
    assert len(wire.unpack_memory_table(wire.Message(5, payload))) == 1


@pytest.mark.parametrize("payload", [b"", struct.pack("=II", 0, 0), struct.pack("=II", 9, 0) + bytes(9 * 32)])
def test_memory_tables_that_are_none(payload):
    with pytest.raises(ProtocolError):
        wire.unpack_memory_table(wire.Message(5, payload))


@given(offset=U32, data=st.binary(max_size=64), flags=U32)
def test_config_access(offset, data, flags):
    access = wire.ConfigAccess(offset, len(data), flags, data)
    assert access.pack() == struct.pack("=III", offset, len(data), flags) + data
    assert wire.ConfigAccess.unpack(wire.Message(24, access.pack())) == access


def test_config_access_that_lies_about_its_size():
    with pytest.raises(ProtocolError):
        wire.ConfigAccess.unpack(wire.Message(24, struct.pack("=III", 0, 8, 0) + bytes(4)))


@pytest.mark.parametrize("size", [0, 4, 12])
def test_u64_of_another_size(size):
    with pytest.raises(ProtocolError):
        wire.unpack_u64(wire.Message(2, bytes(size)))


def test_fds_are_taken_once_and_the_rest_is_closed():
    first, second = os.eventfd(0), os.eventfd(0)
    message = wire.Message(12, fds=[first, second])
    assert message.take_fd() == first
    message.close_fds()
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(second)
    with pytest.raises(ProtocolError, match="without the file descriptor"):
        message.take_fd()
    os.close(first)


def test_every_request_has_the_specification_s_number():
    assert (wire.Request.GET_FEATURES, wire.Request.SET_VRING_ENABLE, wire.Request.GET_STATUS) == (1, 18, 40)
    assert sorted(wire.Request) == list(range(1, 45))
    assert sorted(wire.BackendRequest) == list(range(1, 11))
