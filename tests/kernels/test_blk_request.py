"""Splitting a request into header, data and status, however the driver spread it."""

import itertools
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import status
from kernels.blk_request import parse_request

pytestmark = pytest.mark.timeout(120)


def cuts(total):
    return st.lists(st.integers(0, total), max_size=5).map(lambda points: sorted({0, total, *points}))


@settings(max_examples=300, deadline=None)
@given(data=st.data(), sent=st.binary(max_size=40), room=st.integers(0, 40))
def test_any_split_gives_the_same_request(data, sent, room):
    header = struct.pack("<IIQ", data.draw(st.integers(0, 20)), 0, data.draw(st.integers(0, (1 << 64) - 1)))
    outgoing = np.frombuffer(header + sent, np.uint8).copy()
    incoming = np.zeros(room + 1, np.uint8)
    rows = []
    for buffer in (outgoing, incoming):
        points = data.draw(cuts(len(buffer)))
        rows += [(buffer.ctypes.data + a, b - a) for a, b in itertools.pairwise(points)]
        if buffer is outgoing:
            readable = len(rows)
    segments = np.array(rows, np.uint64).reshape(-1, 2)
    scratch = np.zeros(16, np.uint8)
    code, kind, sector, first, end, write_first, write_end, status_address = parse_request(
        segments, readable, len(rows), np.uint64(scratch.ctypes.data)
    )
    assert code == status.OK
    assert (kind, sector) == struct.unpack("<IxxxxQ", header)
    assert status_address == incoming.ctypes.data + room
    assert int(segments[first:end, 1].sum()) == len(sent)
    assert int(segments[write_first:write_end, 1].sum()) == room
    position = outgoing.ctypes.data + 16
    for address, length in segments[first:end].tolist():
        assert address == position
        position += length


@pytest.mark.parametrize("length", [0, 1, 15])
def test_short_header_is_the_request_s_fault(length):
    sent, incoming, scratch = np.zeros(16, np.uint8), np.zeros(1, np.uint8), np.zeros(16, np.uint8)
    rows = ([(sent.ctypes.data, length)] if length else []) + [(incoming.ctypes.data, 1)]
    segments = np.array(rows, np.uint64)
    answer = parse_request(segments, len(rows) - 1, len(rows), np.uint64(scratch.ctypes.data))
    assert answer[0] == status.ERR_BAD_REQUEST
    assert answer[-1] == incoming.ctypes.data


def test_nothing_writable_is_the_ring_s_fault():
    sent, scratch = np.zeros(16, np.uint8), np.zeros(16, np.uint8)
    segments = np.array([(sent.ctypes.data, 16)], np.uint64)
    assert parse_request(segments, 1, 1, np.uint64(scratch.ctypes.data))[0] == status.ERR_NO_STATUS
