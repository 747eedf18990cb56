"""Chain walking against a plain-Python model, with drivers that follow the rules and drivers that do not."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import status
from kernels.chain import INDIRECT_MAX, read_chain
from kernels.request_record import SEGMENTS_MAX
from tests.kernels.process_memory import ProcessMemory, new_ring

NEXT, WRITE, INDIRECT = 1, 2, 4
LAYOUT = [(0x10000, 0x4000), (0x14000, 0x2000), (0x40000, 0x3000)]
DESC, TABLES = 0x10000, 0x11000
SEGMENTS = np.zeros((2 * SEGMENTS_MAX, 2), np.uint64)

pytestmark = pytest.mark.timeout(120)


def model_pieces(memory, gpa, length):
    """The segments of one buffer: [(address, length)], address 0 where it leaves guest memory."""
    pieces = []
    while length:
        for base, size, address, _, _ in memory.regions.tolist():
            if base <= gpa < base + size:
                part = min(length, base + size - gpa)
                pieces.append((address + gpa - base, part))
                gpa, length = gpa + part, length - part
                break
        else:
            return [*pieces, (0, length)]
    return pieces


def model(memory, size, head, indirect_allowed):
    """(status, readable segments, all segments, clean) by the specification's text."""
    table, entries, limit, index = DESC, size, size, head
    segments, readable, clean, in_table = [], None, True, False
    seen = 0
    while True:
        seen += 1
        if seen > limit:
            return (status.ERR_CHAIN_TOO_LONG,)
        gpa, length, flags, following = struct.unpack("<QIHH", memory.read(table + 16 * index, 16))
        if flags & INDIRECT:
            count = length // 16
            bad = in_table or not indirect_allowed or flags & NEXT or not count or length % 16
            if bad or count > max(size, INDIRECT_MAX):
                return (status.ERR_INDIRECT_TABLE,)
            if not any(base <= gpa and gpa + length <= base + room for base, room in LAYOUT):
                return (status.ERR_INDIRECT_TABLE,)
            table, entries, limit, index, in_table = gpa, count, seen + count, 0, True
            continue
        if flags & WRITE:
            readable = len(segments) if readable is None else readable
        elif readable is not None:
            return (status.ERR_DIRECTION,)
        pieces = model_pieces(memory, gpa, length)
        clean = clean and length > 0 and all(address for address, _ in pieces)
        segments += pieces
        if not flags & NEXT:
            break
        if following >= entries:
            return (status.ERR_NEXT_INDEX,)
        index = following
    return status.OK, len(segments) if readable is None else readable, segments, clean


ADDRESSES = st.one_of(
    st.integers(0x10000, 0x16000), st.integers(0x3FF00, 0x43100), st.integers(0, (1 << 64) - 1), st.just(TABLES)
)
LENGTHS = st.one_of(st.integers(0, 64), st.sampled_from([16, 32, 48, 512, 4096]), st.integers(0, (1 << 32) - 1))


def descriptors(size):
    flags = st.sampled_from([0, NEXT, WRITE, NEXT | WRITE, NEXT, NEXT, INDIRECT, INDIRECT | NEXT, 0xFFFF])
    following = st.one_of(st.integers(0, size - 1), st.integers(0, size + 1))
    return st.lists(st.tuples(ADDRESSES, LENGTHS, flags, following), min_size=size, max_size=size)


@settings(max_examples=400, deadline=None)
@given(data=st.data(), size_log=st.integers(0, 4), indirect_allowed=st.booleans())
def test_walk_agrees_with_the_model(data, size_log, indirect_allowed):
    size = 1 << size_log
    memory = ProcessMemory(LAYOUT)
    rings, _ = new_ring(memory, size, DESC, 0x12000, 0x13000, indirect=int(indirect_allowed))
    for index, descriptor in enumerate(data.draw(descriptors(size))):
        memory.write(DESC + 16 * index, struct.pack("<QIHH", *descriptor))
    for index, descriptor in enumerate(data.draw(descriptors(4))):
        memory.write(TABLES + 16 * index, struct.pack("<QIHH", *descriptor))
    head = data.draw(st.integers(0, size - 1))
    expected = model(memory, size, head, indirect_allowed)
    code, readable, count, clean = read_chain(rings[0], memory.regions, head, SEGMENTS)
    assert code == expected[0]
    if code == status.OK:
        assert (readable, bool(clean)) == (expected[1], expected[3])
        assert [tuple(row) for row in SEGMENTS[:count].tolist()] == expected[2]


def test_longest_direct_chain_is_walked():
    memory = ProcessMemory([(0x10000, 1 << 20)])
    size = 1024
    rings, _ = new_ring(memory, size, 0x10000, 0x20000, 0x30000)
    for index in range(size):
        flags = NEXT if index < size - 1 else 0
        memory.write(0x10000 + 16 * index, struct.pack("<QIHH", 0x40000 + index, 1, flags, index + 1))
    assert read_chain(rings[0], memory.regions, 0, SEGMENTS) == (status.OK, size, size, 1)


def test_loop_of_a_whole_ring_is_noticed():
    memory = ProcessMemory([(0x10000, 1 << 20)])
    rings, _ = new_ring(memory, 256, 0x10000, 0x20000, 0x30000)
    for index in range(256):
        memory.write(0x10000 + 16 * index, struct.pack("<QIHH", 0x40000, 1, NEXT, (index + 1) % 256))
    assert read_chain(rings[0], memory.regions, 5, SEGMENTS)[0] == status.ERR_CHAIN_TOO_LONG
