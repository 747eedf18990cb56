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


def test_the_end_of_the_file_is_an_error(file):
    memory = np.zeros(8192, np.uint8)
    assert transfer(file, memory, [(0, 8192)], FILE_BYTES - 4096, False) == ERR_IO
    assert transfer(-1, memory, [(0, 512)], 0, True) == ERR_IO
