"""Notification decisions and index arithmetic of the device side."""

import os
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels import control_block as cb
from kernels import split_ring, status, vring
from tests.kernels.process_memory import ProcessMemory, new_ring

DESC, AVAIL, USED = 0x10000, 0x11000, 0x12000
INDEX = st.integers(0, 0xFFFF)
ONE = np.ones(1, np.uint64)

pytestmark = pytest.mark.timeout(120)


def passed(event, new, old):
    """Whether walking from old to new goes over event: the specification's words, step by step."""
    index = old
    while index != new:
        if index == event:
            return True
        index = (index + 1) & 0xFFFF
    return False


@given(event=INDEX, old=INDEX, steps=st.integers(0, 300))
def test_needs_event(event, old, steps):
    new = (old + steps) & 0xFFFF
    near = (old + event % 310) & 0xFFFF
    for candidate in (event, near):
        got = split_ring.needs_event(np.uint16(candidate), np.uint16(new), np.uint16(old))
        assert bool(got) == passed(candidate, new, old)


@given(last=INDEX, ahead=st.integers(0, 20))
def test_count_available(last, ahead):
    memory = ProcessMemory([(0x10000, 0x4000)])
    rings, _ = new_ring(memory, 16, DESC, AVAIL, USED)
    rings["last_avail_idx"] = last
    memory.write(AVAIL + 2, struct.pack("<H", (last + ahead) & 0xFFFF))
    assert split_ring.count_available(rings[0]) == (ahead if ahead <= 16 else status.ERR_AVAIL_IDX)


@given(start=INDEX, heads=st.lists(st.integers(0, 7), min_size=1, max_size=8))
def test_used_elements_land_where_the_driver_looks(start, heads):
    memory = ProcessMemory([(0x10000, 0x4000)])
    rings, record = new_ring(memory, 8, DESC, AVAIL, USED)
    rings["used_idx"] = start
    memory.write(USED + 2, struct.pack("<H", start))
    for head in heads:
        split_ring.put_used(rings[0], head, np.uint64(head + 100))
    assert struct.unpack("<H", memory.read(USED + 2, 2)) == (start,), "nothing shows before publish"
    vring.publish(rings[0], np.uint64(ONE.ctypes.data))
    end = (start + len(heads)) & 0xFFFF
    assert struct.unpack("<H", memory.read(USED + 2, 2)) == (end,)
    assert record["used_idx"][0] == end
    for offset, head in enumerate(heads):
        slot = (start + offset) % 8
        assert struct.unpack("<II", memory.read(USED + 4 + 8 * slot, 8)) == (head, head + 100)


@pytest.mark.parametrize("event_idx", [0, 1])
def test_call_follows_the_driver_s_wish(event_idx):
    memory = ProcessMemory([(0x10000, 0x4000)])
    rings, _ = new_ring(memory, 8, DESC, AVAIL, USED, event_idx=event_idx)
    call = os.eventfd(0, os.EFD_NONBLOCK)
    rings["call_fd"] = call
    rings["signalled_valid"] = 1
    one = np.uint64(ONE.ctypes.data)

    def use_one(*, wanted):
        if event_idx:
            index = int(rings["used_idx"][0])
            memory.write(AVAIL + 4 + 16, struct.pack("<H", index if wanted else (index + 50) & 0xFFFF))
        else:
            memory.write(AVAIL, struct.pack("<H", 0 if wanted else 1))
        split_ring.put_used(rings[0], 0, np.uint64(1))
        split_ring.publish(rings[0])
        return split_ring.call_if_wanted(rings[0], one)

    assert use_one(wanted=True)
    assert os.eventfd_read(call) == 1
    assert not use_one(wanted=False)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(call)
    assert not split_ring.call_if_wanted(rings[0], one), "nothing new, no call"
    os.close(call)


def test_sleeping_notices_what_came_in_the_meantime():
    memory = ProcessMemory([(0x10000, 0x4000)])
    for event_idx in (0, 1):
        rings, _ = new_ring(memory, 8, DESC, AVAIL, USED, event_idx=event_idx)
        memory.write(AVAIL + 2, struct.pack("<H", 0))
        assert not split_ring.want_kicks(rings[0])
        memory.write(AVAIL + 2, struct.pack("<H", 1))
        assert split_ring.want_kicks(rings[0])


@pytest.mark.parametrize(
    ("size", "desc", "avail", "used", "expected"),
    [
        (8, DESC, AVAIL, USED, status.OK),
        (0, DESC, AVAIL, USED, status.ERR_QUEUE_SIZE),
        (12, DESC, AVAIL, USED, status.ERR_QUEUE_SIZE),
        (65536, DESC, AVAIL, USED, status.ERR_QUEUE_SIZE),
        (8, DESC + 8, AVAIL, USED, status.ERR_RING_ADDRESS),
        (8, DESC, AVAIL + 1, USED, status.ERR_RING_ADDRESS),
        (8, DESC, AVAIL, USED + 2, status.ERR_RING_ADDRESS),
        (8, 0x13FF0, AVAIL, USED, status.ERR_RING_ADDRESS),
        (8, DESC, 0x13FFE, USED, status.ERR_RING_ADDRESS),
        (8, DESC, AVAIL, 0x14000, status.ERR_RING_ADDRESS),
        (8, 0, AVAIL, USED, status.ERR_RING_ADDRESS),
    ],
)
def test_place_ring(size, desc, avail, used, expected):
    memory = ProcessMemory([(0x10000, 0x4000)])
    rings, _ = new_ring(memory, 8, DESC, AVAIL, USED)
    rings["size"] = size
    parts = [np.uint64(part + ProcessMemory.UVA_BASE) for part in (desc, avail, used)]
    assert vring.place_ring(rings[0], memory.regions, memory.regions, *parts) == expected


def test_broken_state_shows_in_the_control_block():
    memory = ProcessMemory([(0x10000, 0x4000)])
    rings, record = new_ring(memory, 8, DESC, AVAIL, USED)
    rings["error"] = status.ERR_AVAIL_IDX
    vring.set_state(rings[0], cb.VRING_BROKEN)
    assert (record["state"][0], record["error"][0]) == (cb.VRING_BROKEN, status.ERR_AVAIL_IDX)
