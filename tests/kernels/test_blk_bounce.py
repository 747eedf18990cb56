"""The bounce buffer moves the same bytes as preadv and pwritev do."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import blk_bounce, blk_disk
from kernels.status import ERR_IO, OK

FILE_BYTES = 4 << 20


@pytest.fixture(scope="module")
def file():
    fd = os.memfd_create("image")
    os.write(fd, np.random.default_rng(1).bytes(FILE_BYTES))
    yield fd
    os.close(fd)


def transfer(fd, memory, parts, offset, writing):
    """parts: (start in `memory`, size)."""
    bounce = np.zeros(blk_disk.BOUNCE_BYTES, np.uint8)
    segments = np.zeros((len(parts), 2), np.uint64)
    for k, (start, size) in enumerate(parts):
        segments[k] = memory.ctypes.data + start, size
    return blk_bounce.bounce_transfer(
        np.int32(fd), np.uint64(bounce.ctypes.data), segments, 0, len(parts), np.int64(offset), writing
    )


sizes = st.lists(st.sampled_from([0, 1, 511, 512, 4096, 65536, (1 << 20) - 1, 1 << 20, (1 << 20) + 512]), max_size=6)


@settings(max_examples=60, deadline=None)
@given(sizes=sizes, offset=st.integers(0, 4096), writing=st.booleans())
def test_bytes_go_where_they_belong(file, sizes, offset, writing):
    total = sum(sizes)
    if offset + total > FILE_BYTES:
        return
    memory = np.frombuffer(bytearray(np.random.default_rng(total).bytes(total + 64)), np.uint8)
    # Back to front, so that neighbours in the request are none in memory.
    starts = [sum(sizes[k + 1 :]) for k in range(len(sizes))]
    parts = list(zip(starts, sizes, strict=True))
    before = memory.copy()
    assert transfer(file, memory, parts, offset, writing) == OK
    expected = b"".join((before if writing else memory)[start : start + size].tobytes() for start, size in parts)
    assert os.pread(file, total, offset) == expected
    assert memory[total:].tobytes() == before[total:].tobytes()
    if writing:
        assert memory.tobytes() == before.tobytes()


def test_the_rows_stay_as_they_are_when_all_is_copied_at_once():
    memory = np.frombuffer(bytearray(np.random.default_rng(3).bytes(8192)), np.uint8)
    rows = np.array(
        [(memory.ctypes.data + 4096, 100), (memory.ctypes.data, 0), (memory.ctypes.data + 7, 513)], np.uint64
    )
    before, contents = rows.copy(), memory.copy()
    buffer = np.zeros(1024, np.uint8)
    blk_bounce.copy_all(rows, 0, 3, np.uint64(buffer.ctypes.data), True)
    assert buffer.tobytes() == contents[4096:4196].tobytes() + contents[7:520].tobytes() + bytes(1024 - 613)
    buffer[:613] = np.arange(613) % 251
    blk_bounce.copy_all(rows, 0, 3, np.uint64(buffer.ctypes.data), False)
    assert memory[4096:4196].tobytes() + memory[7:520].tobytes() == buffer[:613].tobytes()
    memory[4096:4196], memory[7:520] = contents[4096:4196], contents[7:520]
    assert (memory == contents).all(), "nothing else was written"
    assert (rows == before).all()


def test_the_end_of_the_file_is_an_error(file):
    memory = np.zeros(8192, np.uint8)
    assert transfer(file, memory, [(0, 8192)], FILE_BYTES - 4096, False) == ERR_IO
    assert transfer(-1, memory, [(0, 512)], 0, True) == ERR_IO
