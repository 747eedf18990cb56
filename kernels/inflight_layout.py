"""The inflight region (docs/interop/vhost-user.rst, "Inflight I/O tracking"). Plain dtypes, no numba.

The region holds one part for each vring: a head, then a state for each descriptor.
"""

import numpy as np

VERSION = 1
ALIGN_BYTES = 64  # of a vring's part; the specification leaves it open

SPLIT_HEAD = np.dtype(
    [
        ("features", "<u8"),
        ("version", "<u2"),  # 0: not initialized
        ("desc_num", "<u2"),
        ("last_batch_head", "<u2"),
        ("used_idx", "<u2"),
    ]
)
SPLIT_STATE = np.dtype([("inflight", "u1"), ("_pad", "V5"), ("next", "<u2"), ("counter", "<u8")])
assert (SPLIT_HEAD.itemsize, SPLIT_STATE.itemsize) == (16, 16)

# The C structures of the specification: the compiler pads the packed head to 32 bytes, its states being 8-aligned.
PACKED_HEAD = np.dtype(
    [
        ("features", "<u8"),
        ("version", "<u2"),
        ("desc_num", "<u2"),
        ("free_head", "<u2"),
        ("old_free_head", "<u2"),
        ("used_idx", "<u2"),
        ("old_used_idx", "<u2"),
        ("used_wrap_counter", "u1"),
        ("old_used_wrap_counter", "u1"),
        ("_pad", "V10"),
    ]
)
PACKED_STATE = np.dtype(
    [
        ("inflight", "u1"),
        ("_pad", "V1"),
        ("next", "<u2"),
        ("last", "<u2"),
        ("num", "<u2"),
        ("counter", "<u8"),
        ("id", "<u2"),
        ("flags", "<u2"),
        ("len", "<u4"),
        ("addr", "<u8"),
    ]
)
assert (PACKED_HEAD.itemsize, PACKED_STATE.itemsize) == (32, 32)


def part_bytes(queue_size: int, *, packed: bool) -> int:
    """Bytes of one vring's part."""
    head, state = (PACKED_HEAD, PACKED_STATE) if packed else (SPLIT_HEAD, SPLIT_STATE)
    size = head.itemsize + queue_size * state.itemsize
    return -(-size // ALIGN_BYTES) * ALIGN_BYTES
