"""Register by register, at the offsets of virtio 1.2, 4.1.4.3."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vvupipe.virtio.pci_common import CommonConfig

VERSION_1, ACCESS_PLATFORM = 1 << 32, 1 << 33


@pytest.fixture
def common():
    return CommonConfig(VERSION_1 | ACCESS_PLATFORM, [256, 256], 67)


def get(common, offset, width):
    return int.from_bytes(common.read(offset, width), "little")


def put(common, offset, width, value):
    common.write(offset, value.to_bytes(width, "little"))


def negotiate(common, features=VERSION_1):
    put(common, 20, 1, 1)
    put(common, 20, 1, 3)
    for select in (0, 1):
        put(common, 8, 4, select)
        put(common, 12, 4, features >> 32 * select & 0xFFFFFFFF)
    put(common, 20, 1, 11)
    return get(common, 20, 1)


def test_feature_windows(common):
    put(common, 0, 4, 1)
    assert get(common, 4, 4) == 3
    put(common, 0, 4, 0)
    assert get(common, 4, 4) == 0
    put(common, 0, 4, 2)
    assert get(common, 4, 4) == 0


def test_negotiation(common):
    assert negotiate(common) == 11
    put(common, 20, 1, 15)
    assert common.driver_ok


@pytest.mark.parametrize("features", [0, VERSION_1 | 1, VERSION_1 | 1 << 40])
def test_features_that_do_not_fit_are_refused(common, features):
    assert negotiate(common, features) == 3
    put(common, 20, 1, 15)
    assert not common.driver_ok


def test_features_stand_once_they_are_agreed(common):
    negotiate(common)
    put(common, 8, 4, 1)
    put(common, 12, 4, 0xFF)
    assert get(common, 12, 4) == 1


def test_status_bits_are_never_cleared_but_by_reset(common):
    negotiate(common)
    put(common, 20, 1, 1)
    assert get(common, 20, 1) == 11
    put(common, 20, 1, 0)
    assert get(common, 20, 1) == 0


def test_driver_cannot_set_needs_reset(common):
    put(common, 20, 1, 0x41)
    assert get(common, 20, 1) == 1
    common.need_reset()
    assert get(common, 20, 1) == 0x41


def test_queue_registers_are_kept_for_each_queue(common):
    enabled = []
    common.on_enable = enabled.append
    assert get(common, 18, 2) == 2
    for queue in (0, 1):
        put(common, 22, 2, queue)
        assert (get(common, 24, 2), get(common, 26, 2), get(common, 28, 2), get(common, 30, 2)) == (
            256,
            0xFFFF,
            0,
            queue,
        )
        put(common, 24, 2, 128)
        put(common, 26, 2, queue + 1)
        put(common, 32, 8, 0x1_0000_0000 + queue * 0x10000)
        put(common, 40, 4, 0x2000)
        put(common, 44, 4, 0x1)
        put(common, 48, 8, 0x3000)
        put(common, 28, 2, 1)
    assert enabled == [0, 1]
    put(common, 22, 2, 0)
    assert (get(common, 24, 2), get(common, 26, 2), get(common, 28, 2)) == (128, 1, 1)
    assert (get(common, 32, 8), get(common, 40, 8), get(common, 48, 4)) == (0x1_0000_0000, 0x1_0000_2000, 0x3000)
    layout = common.queues[1].layout
    assert (layout.size, layout.desc_gpa, layout.used_gpa) == (128, 0x1_0001_0000, 0x3000)


def test_queue_that_does_not_exist_reads_as_zero_and_takes_nothing(common):
    put(common, 22, 2, 2)
    put(common, 24, 2, 64)
    put(common, 28, 2, 1)
    assert common.read(24, 32) == bytes(32)


@pytest.mark.parametrize("size", [0, 3, 512])
def test_queue_size_that_is_not_possible_is_ignored(common, size):
    put(common, 24, 2, size)
    assert get(common, 24, 2) == 256


def test_enabled_queue_does_not_move(common):
    put(common, 28, 2, 1)
    put(common, 32, 8, 0x9000)
    put(common, 28, 2, 0)
    assert (get(common, 32, 8), get(common, 28, 2)) == (0, 1)


@pytest.mark.parametrize("offset", [16, 26])
def test_vector_that_does_not_exist_reads_back_as_none(common, offset):
    put(common, offset, 2, 66)
    assert get(common, offset, 2) == 66
    put(common, offset, 2, 67)
    assert get(common, offset, 2) == 0xFFFF


def test_reset_is_told_and_clears_everything_but_the_generation(common):
    told = []
    common.on_reset = lambda: told.append(get(common, 28, 2))
    negotiate(common)
    put(common, 28, 2, 1)
    common.config_changed()
    put(common, 20, 1, 0)
    assert told == [0]
    assert get(common, 21, 1) == 1
    assert get(common, 12, 4) == 0


def test_read_of_the_whole_structure(common):
    put(common, 22, 2, 1)
    fields = struct.unpack("<IIIIHHBBHHHHHQQQ", common.read(0, 56))
    assert fields[4:] == (0xFFFF, 2, 0, 0, 1, 256, 0xFFFF, 0, 1, 0, 0, 0)


@given(st.lists(st.tuples(st.integers(0, 80), st.binary(min_size=1, max_size=8))))
def test_any_writes_leave_it_readable(writes):
    common = CommonConfig(VERSION_1 | ACCESS_PLATFORM, [256, 256], 67)
    for offset, data in writes:
        common.write(offset, data)
    assert len(common.read(0, 56)) == 56
    assert all(queue.size in {1 << k for k in range(9)} for queue in common.queues)
