"""Whole messages, their file descriptors, and the numbers of the requests."""

import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vvupipe.errors import ProtocolError
from vvupipe.vhost_user import messages as wire

U32 = st.integers(0, (1 << 32) - 1)


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
