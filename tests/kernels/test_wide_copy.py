"""copy_block copies what it is to copy, and nothing around it, whatever the sizes and places."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.memory import LINE_BYTES
from kernels.wide_copy import TWO_PLACES_BYTES, copy_block, copy_halves, copy_to_file

LARGE = int(TWO_PLACES_BYTES)
ROOM = 3 * LARGE
SOURCE = np.random.default_rng(5).integers(1, 256, ROOM, dtype=np.uint8)


def copied(
    count: int, source_offset: int, destination_offset: int, following_bytes: int = 0, *, to_file: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """What is in a field of zeros after a copy, and what should be. Address 4096, of what follows, is not mapped."""
    field = np.zeros(ROOM + LINE_BYTES, np.uint8)
    (copy_to_file if to_file else copy_block)(
        np.uint64(field.ctypes.data + destination_offset),
        np.uint64(SOURCE.ctypes.data + source_offset),
        np.uint64(count),
        np.uint64(4096),
        np.uint64(following_bytes),
    )
    wanted = np.zeros_like(field)
    wanted[destination_offset : destination_offset + count] = SOURCE[source_offset : source_offset + count]
    return field, wanted


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 512, 4096, LARGE - 1, LARGE, LARGE + 1, LARGE + 127, LARGE + 4096])
@pytest.mark.parametrize("to_file", [False, True])
def test_sizes_at_every_turn(count, to_file):
    field, wanted = copied(count, 0, 0, to_file=to_file)
    assert np.array_equal(field, wanted)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, ROOM - 4096), st.integers(0, 4095), st.integers(0, 4095), st.integers(0, ROOM))
def test_any_size_at_any_place(count, source_offset, destination_offset, following_bytes):
    count = min(count, ROOM - max(source_offset, destination_offset))
    field, wanted = copied(count, source_offset, destination_offset, following_bytes)
    assert np.array_equal(field, wanted)


@pytest.mark.parametrize("following_half", [0, LINE_BYTES, LARGE])
def test_halves_are_whole(following_half):
    field = np.zeros(ROOM, np.uint8)
    copy_halves(
        np.uint64(field.ctypes.data),
        np.uint64(SOURCE.ctypes.data),
        np.uint64(LARGE),
        np.uint64(4096),
        np.uint64(following_half),
    )
    assert np.array_equal(field[: 2 * LARGE], SOURCE[: 2 * LARGE])
    assert not field[2 * LARGE :].any()
