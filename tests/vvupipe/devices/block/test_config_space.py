"""The configuration space, field by field as virtio 1.2, 5.2.4 lays it out."""

import struct

import pytest

from vvupipe.devices.block.config_space import SIZE_BYTES, WRITEBACK_OFFSET, ConfigSpace

PLACES = [  # field, offset, format
    ("capacity", 0, "<Q"), ("size_max", 8, "<I"), ("seg_max", 12, "<I"), ("cylinders", 16, "<H"), ("heads", 18, "<B"),
    ("sectors", 19, "<B"), ("blk_size", 20, "<I"), ("physical_block_exp", 24, "<B"), ("alignment_offset", 25, "<B"),
    ("min_io_size", 26, "<H"), ("opt_io_size", 28, "<I"), ("writeback", 32, "<B"), ("num_queues", 34, "<H"),
    ("max_discard_sectors", 36, "<I"), ("max_discard_seg", 40, "<I"), ("discard_sector_alignment", 44, "<I"),
    ("max_write_zeroes_sectors", 48, "<I"), ("max_write_zeroes_seg", 52, "<I"), ("write_zeroes_may_unmap", 56, "<B"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "offset", "layout"), PLACES)
def test_field(name, offset, layout):
    empty = ConfigSpace(**{"capacity": 0, "blk_size": 0, "num_queues": 0}).pack()
    assert empty == bytes(SIZE_BYTES)
    fields = {"capacity": 0, "blk_size": 0, "num_queues": 0, name: 0xA5}
    space = ConfigSpace(**fields).pack()
    size = struct.calcsize(layout)
    assert struct.unpack_from(layout, space, offset) == (0xA5,)
    assert space[:offset] + space[offset + size :] == bytes(SIZE_BYTES - size), "nothing else moved"


def test_size():
    assert (SIZE_BYTES, WRITEBACK_OFFSET) == (60, 32)
