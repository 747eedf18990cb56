"""Numbers of the virtio specification (1.2) that both planes use; no numba here.

Addresses and sizes are in bytes unless the name says sectors (512 bytes).
"""

# 2.7.5 The Virtqueue Descriptor Table: le64 addr, le32 len, le16 flags, le16 next
DESC_SIZE = 16
DESC_F_NEXT = 1
DESC_F_WRITE = 2
DESC_F_INDIRECT = 4

# 2.7.6 The Virtqueue Available Ring: le16 flags, le16 idx, le16 ring[], le16 used_event
AVAIL_FLAGS = 0
AVAIL_IDX = 2
AVAIL_RING = 4
AVAIL_F_NO_INTERRUPT = 1

# 2.7.8 The Virtqueue Used Ring: le16 flags, le16 idx, {le32 id, le32 len} ring[], le16 avail_event
USED_FLAGS = 0
USED_IDX = 2
USED_RING = 4
USED_ELEM_SIZE = 8
USED_F_NO_NOTIFY = 1

# 2.8.13 Packed Virtqueue Descriptor: le64 addr, le32 len, le16 id, le16 flags
PACKED_DESC_F_AVAIL = 1 << 7  # 2.8.1
PACKED_DESC_F_USED = 1 << 15
PACKED_WRAP = 1 << 15  # 2.8.14 event suppression and vhost-user ring bases: position in bits 0-14, wrap counter in 15

# 2.8.14 Event Suppression Structure Format: le16 offset and wrap counter, le16 flags
EVENT_OFF_WRAP = 0
EVENT_FLAGS = 2
EVENT_BYTES = 4
EVENT_F_ENABLE = 0
EVENT_F_DISABLE = 1
EVENT_F_DESC = 2

QUEUE_SIZE_MAX = 32768  # 2.7 Split Virtqueues


def avail_bytes(queue_size: int) -> int:
    """Size of an available ring with its used_event (2.7.6)."""
    return 6 + 2 * queue_size


def used_bytes(queue_size: int) -> int:
    """Size of a used ring with its avail_event (2.7.8)."""
    return 6 + 8 * queue_size


# 6 Reserved Feature Bits
F_RING_INDIRECT_DESC = 1 << 28
F_RING_EVENT_IDX = 1 << 29
F_VERSION_1 = 1 << 32
F_ACCESS_PLATFORM = 1 << 33
F_RING_PACKED = 1 << 34
F_IN_ORDER = 1 << 35
F_ORDER_PLATFORM = 1 << 36
F_NOTIFICATION_DATA = 1 << 38
F_RING_RESET = 1 << 40

# 5.2.3 Block Device, Feature bits
BLK_F_SIZE_MAX = 1 << 1
BLK_F_SEG_MAX = 1 << 2
BLK_F_RO = 1 << 5
BLK_F_BLK_SIZE = 1 << 6
BLK_F_FLUSH = 1 << 9
BLK_F_TOPOLOGY = 1 << 10
BLK_F_CONFIG_WCE = 1 << 11
BLK_F_MQ = 1 << 12
BLK_F_DISCARD = 1 << 13
BLK_F_WRITE_ZEROES = 1 << 14
BLK_F_LIFETIME = 1 << 15
BLK_F_SECURE_ERASE = 1 << 16
BLK_F_ZONED = 1 << 17

# 5.2.6 Block Device, Device Operation: header le32 type, le32 reserved, le64 sector; one status byte at the end
BLK_HEADER_SIZE = 16
BLK_T_IN = 0
BLK_T_OUT = 1
BLK_T_FLUSH = 4
BLK_T_GET_ID = 8
BLK_T_GET_LIFETIME = 10
BLK_T_DISCARD = 11
BLK_T_WRITE_ZEROES = 13
BLK_T_SECURE_ERASE = 14
BLK_RANGE_SIZE = 16  # struct virtio_blk_discard_write_zeroes: le64 sector, le32 num_sectors, le32 flags
BLK_RANGE_F_UNMAP = 1
BLK_S_OK = 0
BLK_S_IOERR = 1
BLK_S_UNSUPP = 2
BLK_ID_BYTES = 20
SECTOR_BYTES = 512
SECTOR_SHIFT = 9

#: max_discard_seg and max_write_zeroes_seg
RANGES_MAX = 256
#: max_discard_sectors and max_write_zeroes_sectors: 1 GiB, so that one request does not hold up its vring for long
RANGE_SECTORS_MAX = 1 << 21

#: What a translation, or a region, lets the device do.
ACCESS_READ = 1
ACCESS_WRITE = 2
ACCESS_BOTH = 3
ACCESS_REFUSED = 4  # the front-end was asked and has nothing there
