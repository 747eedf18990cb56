"""The image as its worker keeps it, and what bounds requests. Plain, no numba."""

import mmap

import numpy as np

#: Segments that a request may have when somebody else than the worker does it; longer ones are done on the spot.
SEGMENTS_EACH = 256
#: Room for what is read or written by way of this process.
BOUNCE_BYTES = 1 << 20
#: And for each request under way, for what io_uring reads or writes: longer ones are a helper's.
BOUNCE_ROOM_BYTES = 256 << 10
GRANULE_SHIFT = 16
#: Bytes that mincore writes for a granule of the mapping.
VECTOR_BYTES = max(1, (1 << GRANULE_SHIFT) // mmap.PAGESIZE)

DISK = np.dtype(
    [
        ("fd", "<i8"),
        ("capacity_sectors", "<u8"),
        ("read_only", "<i8"),
        ("map_address", "<u8"),  # the file mapped into this process; 0: read it by system call
        ("map_bytes", "<u8"),
        ("map_writable", "<i8"),  # 1: writes go to the mapping
        ("map_always", "<i8"),  # 1: what is mapped is always in memory (DAX)
        ("granules_address", "<u8"),  # a byte for each granule of the mapping (kernels.image_map)
        ("granules", "<u8"),
        ("granule_mark", "<u8"),  # the byte of a granule that is in memory
        ("lookups", "<u8"),  # since the marks were made anew
        ("vector_address", "<u8"),  # room for what mincore tells of a granule
        ("id_address", "<u8"),  # BLK_ID_BYTES of serial, zero-padded
        ("bus_errors", "<u8"),  # addresses of control_block.WORKER's fields
        ("memory_errors", "<u8"),
        ("disk_errors", "<u8"),
        ("disk_errno", "<u8"),
        ("bounce_address", "<u8"),  # BOUNCE_BYTES of this process
        ("bounce_rooms", "<u8"),  # BOUNCE_ROOM_BYTES for each slot of a request under way; 0: none
        ("bounces", "<i8"),  # 1: the kernel refused guest memory once, so do not try again
        ("direct", "<i8"),  # 1: opened with O_DIRECT, which not every piece of guest memory is aligned for
        ("nowait", "<i8"),  # 1: try to read without waiting for the disk (RWF_NOWAIT) before somebody else reads
        ("merge_bytes", "<u8"),  # adjacent requests are done together up to this; 0: never
        ("unsafe", "<i8"),  # 1: a flush does nothing (--cache unsafe)
        ("is_block", "<i8"),  # 1: a block device
        ("logical_bytes", "<u8"),  # a block device: its logical block, a power of two
        ("can_discard", "<i8"),  # what the file can do (devices/block/image_limits)
        ("can_write_zeroes", "<i8"),
        ("can_punch", "<i8"),
        ("can_zero_range", "<i8"),
        ("zeros_address", "<u8"),  # zeros_bytes of zeros
        ("zeros_bytes", "<u8"),
        ("waited", "<i8"),  # set to 1 by whatever may have waited for the disk
    ]
)
