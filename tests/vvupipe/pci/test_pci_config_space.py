import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vvupipe.pci.config_space import Bar, ConfigSpace
from vvupipe.pci.msix import Msix


def make():
    config = ConfigSpace(
        vendor=0x1AF4, device=0x107D, class_code=0x00FF00, revision=1, subsystem_vendor=0x1AF4, subsystem=0x1100
    )
    config.add_bar(Bar(0, 0x8000))
    config.add_bar(Bar(2, 0x4000))
    config.add_bar(Bar(4, 1 << 38, is_64bit=True, prefetchable=True))
    return config


def test_identity_at_the_offsets_of_the_specification():
    header = make().read(0, 64)
    assert struct.unpack_from("<HH", header, 0) == (0x1AF4, 0x107D)
    assert header[8:12] == bytes((1, 0x00, 0xFF, 0x00))
    assert header[14] == 0
    assert struct.unpack_from("<HH", header, 0x2C) == (0x1AF4, 0x1100)


def size_bar(config, index, width):
    offset = 0x10 + 4 * index
    for k in range(0, width, 4):
        config.write(offset + k, b"\xff" * 4)
    value = int.from_bytes(config.read(offset, width), "little")
    return (~(value & ~0xF) + 1) & ((1 << 8 * width) - 1), value & 0xF


def test_bars_tell_their_sizes_and_kinds():
    config = make()
    assert size_bar(config, 0, 4) == (0x8000, 0)
    assert size_bar(config, 2, 4) == (0x4000, 0)
    assert size_bar(config, 4, 8) == (1 << 38, 0b1100)
    assert config.read(0x10 + 4, 4) == bytes(4)


def test_bar_of_the_64bit_kind_takes_two_places():
    with pytest.raises(ValueError, match="no place"):
        make().add_bar(Bar(5, 0x1000))
    with pytest.raises(ValueError, match="no place"):
        ConfigSpace(vendor=1, device=1, class_code=0).add_bar(Bar(5, 0x1000, is_64bit=True))


@pytest.mark.parametrize("size", [0, 8, 0x3000])
def test_bar_size_must_be_a_power_of_two(size):
    with pytest.raises(ValueError, match="power of two"):
        Bar(0, size)


def test_command_register_keeps_only_what_a_driver_may_set():
    config = make()
    config.write(4, b"\xff\xff")
    assert int.from_bytes(config.read(4, 2), "little") == 0x0506


def test_capability_list_can_be_walked():
    config = make()
    Msix(config, 67, 0, 0x4000, 0x6000)
    config.add_capability(0x09, b"\x10" + bytes(13))
    assert int.from_bytes(config.read(6, 2), "little") & 0x10
    first = config.read(0x34, 1)[0]
    kind, following = config.read(first, 2)
    assert kind == 0x11
    assert struct.unpack("<HII", config.read(first + 2, 10)) == (66, 0x4000, 0x6000)
    assert tuple(config.read(following, 2)) == (0x09, 0)
    assert following % 4 == 0


def test_full_space_refuses_another_capability():
    config = make()
    for _ in range(6):
        config.add_capability(0x09, bytes(30))
    with pytest.raises(ValueError, match="no room"):
        config.add_capability(0x09, bytes(30))


def test_reset_keeps_the_places_of_the_bars():
    config = make()
    config.place_bar(0, 0xE0000000)
    config.write(4, b"\x06\x00")
    config.write(0x10, b"\0\0\0\x12")
    assert config.bar_address(0) == 0x12000000
    config.reset()
    assert config.bar_address(0) == 0xE0000000
    assert config.read(4, 2) == b"\0\0"


def test_change_is_told_only_when_something_changed():
    config, told = make(), []
    config.on_change = lambda: told.append(1)
    config.write(0, b"\xff\xff")  # read-only
    assert not told
    config.write(4, b"\x02\x00")
    assert told == [1]


@given(st.integers(0, 300), st.binary(min_size=1, max_size=16))
def test_any_write_leaves_identity_and_layout(offset, data):
    config = make()
    Msix(config, 67, 0, 0x4000, 0x6000)
    config.write(offset, data)
    assert len(config.read(0, 256)) == 256
    assert config.read(0, 4) == b"\xf4\x1a\x7d\x10"
    assert config.read(0x34, 1) == b"\x40"
    assert config.bar_address(4) % (1 << 38) == 0


def test_msix_capability_registers_and_pending_bits():
    config = make()
    msix = Msix(config, 67, 0, 0x4000, 0x6000)
    config.write(0x42, b"\xff\xff")
    assert msix.enabled
    assert int.from_bytes(config.read(0x42, 2), "little") == 0xC000 | 66
    assert msix.read_table(12, 4) == b"\1\0\0\0"  # masked after reset
    msix.write_table(16, struct.pack("<QII", 0xFEE00000, 0x41, 0))
    assert struct.unpack("<QII", msix.read_table(16, 16)) == (0xFEE00000, 0x41, 0)
    msix.write_table(67 * 16 - 4, b"\xff" * 8)
    assert len(msix.read_table(0, 67 * 16)) == 67 * 16
    msix.set_pending(65, True)
    assert msix.read_pending(0, 16) == bytes(8) + b"\2" + bytes(7)
    msix.set_pending(65, False)
    assert not any(msix.read_pending(0, 16))
