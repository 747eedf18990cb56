"""The virtio-blk configuration space (virtio 1.2, 5.2.4)."""

from __future__ import annotations

import struct
from dataclasses import astuple, dataclass

#: One format letter for each field of ConfigSpace; x for unused0 and unused1.
_LAYOUT = struct.Struct("<QIIHBBIBBHIBxHIIIIIB3x")

SIZE_BYTES = 60
WRITEBACK_OFFSET = 32  #: the one field that a driver may write (5.2.5, CONFIG_WCE)

assert _LAYOUT.size == SIZE_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigSpace:
    """struct virtio_blk_config, in its order; a field counts when the feature that is named beside it is offered."""

    capacity_sectors: int = 0  #: always; sectors of 512 bytes
    size_max_bytes: int = 0  #: SIZE_MAX: of one segment
    seg_max: int = 0  #: SEG_MAX: segments of one request
    cylinders: int = 0  #: GEOMETRY
    heads: int = 0
    sectors: int = 0
    blk_size_bytes: int = 0  #: BLK_SIZE: the logical block
    physical_block_exp: int = 0  #: TOPOLOGY: logical blocks in a physical one, as a power of two
    alignment_offset: int = 0  #: logical blocks before the first that is aligned
    min_io_size: int = 0  #: logical blocks
    opt_io_size: int = 0  #: logical blocks
    writeback: int = 0  #: FLUSH or CONFIG_WCE: 1 writeback, 0 writethrough
    num_queues: int = 0  #: MQ
    max_discard_sectors: int = 0  #: DISCARD: sectors of 512 bytes in one segment
    max_discard_seg: int = 0
    discard_sector_alignment: int = 0  #: sectors of 512 bytes
    max_write_zeroes_sectors: int = 0  #: WRITE_ZEROES: sectors of 512 bytes in one segment
    max_write_zeroes_seg: int = 0
    write_zeroes_may_unmap: int = 0  #: 1: the flag `unmap` may give space back

    def pack(self) -> bytes:
        """The 60 bytes that a driver reads. Raises: struct.error when a number does not fit its field."""
        return _LAYOUT.pack(*astuple(self))
