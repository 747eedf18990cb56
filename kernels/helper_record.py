"""A helper as its worker keeps it (kernels/helper.py). Plain, no numba."""

import numpy as np

IDLE = 0
GIVEN = 1  # the worker: do the request of `slot`
DONE = 2  # the helper: it is done

#: Padded to 128 bytes: two helpers share no cache line.
HELPER = np.dtype(
    {
        "names": ["state", "wake_fd", "slot", "done_fd", "one", "scratch"],
        "formats": ["<u4", "<i4", "<i8", "<i8", "<u8", "<u8"],
        "offsets": [0, 4, 8, 16, 24, 32],
        "itemsize": 128,
    }
)
# state: IDLE, GIVEN or DONE. done_fd: eventfd of the worker. one: address of a 64-bit 1. scratch: address of 64 bytes.
