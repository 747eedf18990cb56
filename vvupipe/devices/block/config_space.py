"""The virtio-blk configuration space (virtio 1.2, 5.2.4)."""

from __future__ import annotations

import dataclasses
import struct

WRITEBACK_OFFSET = 32
#: capacity, size_max, seg_max, cylinders, heads, sectors, blk_size, physical_block_exp, alignment_offset, min_io_size,
#: opt_io_size, writeback, unused0, num_queues, max_discard_sectors, max_discard_seg, discard_sector_alignment,
#: max_write_zeroes_sectors, max_write_zeroes_seg, write_zeroes_may_unmap, unused1[3]; what follows belongs to features
#: that are not offered (secure erase, zoned).
_LAYOUT = struct.Struct("<QIIHBBIBBHIBBHIIIIIB3x")
SIZE_BYTES = _LAYOUT.size
assert SIZE_BYTES == 60


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ConfigSpace:
    """The fields by the specification's names; those of features that are not offered stay 0."""

    capacity: int
    size_max: int = 0
    seg_max: int = 0
    cylinders: int = 0
    heads: int = 0
    sectors: int = 0
    blk_size: int = 512
    physical_block_exp: int = 0
    alignment_offset: int = 0
    min_io_size: int = 0
    opt_io_size: int = 0
    writeback: int = 0
    unused0: int = 0
    num_queues: int = 1
    max_discard_sectors: int = 0
    max_discard_seg: int = 0
    discard_sector_alignment: int = 0
    max_write_zeroes_sectors: int = 0
    max_write_zeroes_seg: int = 0
    write_zeroes_may_unmap: int = 0

    def pack(self) -> bytes:
        """The SIZE_BYTES as a driver reads them."""
        return _LAYOUT.pack(*(getattr(self, field.name) for field in dataclasses.fields(self)))
