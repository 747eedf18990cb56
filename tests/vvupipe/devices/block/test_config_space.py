"""The configuration space, field by field as virtio 1.2, 5.2.4 lays it out."""

import struct
from dataclasses import fields

import pytest

from vvupipe.devices.block.config_space import SIZE_BYTES, WRITEBACK_OFFSET, ConfigSpace

#: field, offset, format: from the structure in the specification, added up by hand
LAYOUT = [
    ("capacity_sectors", 0, "<Q"),
    ("size_max_bytes", 8, "<I"),
    ("seg_max", 12, "<I"),
    ("cylinders", 16, "<H"),
    ("heads", 18, "<B"),
    ("sectors", 19, "<B"),
    ("blk_size_bytes", 20, "<I"),
    ("physical_block_exp", 24, "<B"),
    ("alignment_offset", 25, "<B"),
    ("min_io_size", 26, "<H"),
    ("opt_io_size", 28, "<I"),
    ("writeback", 32, "<B"),
    ("num_queues", 34, "<H"),
    ("max_discard_sectors", 36, "<I"),
    ("max_discard_seg", 40, "<I"),
    ("discard_sector_alignment", 44, "<I"),
    ("max_write_zeroes_sectors", 48, "<I"),
    ("max_write_zeroes_seg", 52, "<I"),
    ("write_zeroes_may_unmap", 56, "<B"),
]


@pytest.mark.parametrize(("field", "offset", "form"), LAYOUT)
def test_field_alone(field, offset, form):
    largest = (1 << 8 * struct.calcsize(form)) - 1
    space = ConfigSpace(**{field: largest}).pack()
    after = offset + struct.calcsize(form)
    assert struct.unpack_from(form, space, offset) == (largest,)
    assert space[:offset] + space[after:] == bytes(len(space) - struct.calcsize(form))
    with pytest.raises(struct.error):
        ConfigSpace(**{field: largest + 1}).pack()


def test_layout_names_every_field():
    assert [name for name, _, _ in LAYOUT] == [field.name for field in fields(ConfigSpace)]


def test_size():
    assert len(ConfigSpace().pack()) == SIZE_BYTES == 60
    assert ConfigSpace().pack() == bytes(60)
    assert ConfigSpace(writeback=1).pack()[WRITEBACK_OFFSET] == 1
