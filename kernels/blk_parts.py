"""All that a block worker's process hands to its kernels: addresses and numbers of elements. Plain, no numba."""

import numpy as np

#: What blk_work.BlockWork is made of, and what the loop has besides; named alike.
PARTS = np.dtype(
    [
        ("loop", "<u8"),  # loop_record.LOOP[1]
        ("pollfds", "<u8"),
        ("num_pollfds", "<i8"),
        ("rings", "<u8"),
        ("num_rings", "<i8"),
        ("running", "<u8"),
        ("disk", "<u8"),
        ("regions", "<u8"),
        ("num_regions", "<i8"),
        ("memory", "<u8"),
        ("num_memory", "<i8"),
        ("segments", "<u8"),
        ("copied", "<u8"),
        ("board", "<u8"),
        ("chains", "<u8"),
        ("requests", "<u8"),
        ("uring", "<u8"),
        ("buffers", "<u8"),
        ("num_buffers", "<i8"),
        ("tokens", "<u8"),
        ("results", "<u8"),
        ("helpers", "<u8"),
        ("num_helpers", "<i8"),
        ("scratch", "<u8"),
        ("one", "<u8"),
        ("notice_fd", "<i8"),
    ]
)
