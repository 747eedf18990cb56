"""The second 64-bit word of a descriptor, behind its address: le32 len, then two le16.

Split ring (virtio 1.2, 2.7.5): flags, next. Packed ring (2.8.13): id, flags.
"""

import numpy as np

LEN_MASK = np.uint64(0xFFFFFFFF)
FIELD_MASK = np.uint64(0xFFFF)
SPLIT_FLAGS_SHIFT = np.uint64(32)
SPLIT_NEXT_SHIFT = np.uint64(48)
PACKED_ID_SHIFT = np.uint64(32)
PACKED_FLAGS_SHIFT = np.uint64(48)
