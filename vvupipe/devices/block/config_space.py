"""The virtio-blk configuration space (virtio 1.2, 5.2.4)."""

from __future__ import annotations

import struct

from kernels.virtio_layout import SECTOR_BYTES

#: capacity, size_max, seg_max, cylinders, heads, sectors, blk_size, physical_block_exp, alignment_offset,
#: min_io_size, opt_io_size, writeback, unused0, num_queues; later fields belong to features that are not offered.
_LAYOUT = struct.Struct("<QIIHBBIBBHIBBH")
assert _LAYOUT.size == 36


def pack(size_bytes: int, block_size_bytes: int, seg_max: int, num_queues: int) -> bytes:
    """The space of a disk without topology or geometry; `writeback` says 1, which FLUSH implies."""
    return _LAYOUT.pack(size_bytes // SECTOR_BYTES, 0, seg_max, 0, 0, 0, block_size_bytes, 0, 0, 0, 0, 1, 0, num_queues)
