"""All that a vCPU's process hands to its kernels: addresses and numbers of elements. Plain, no numba."""

import numpy as np

PARTS = np.dtype(
    [
        ("wait", "<u8"),  # driver_layout.WAIT[1]
        ("ring", "<u8"),  # DRIVER_RING[1]
        ("pollfds", "<u8"),  # loop_record.POLLFD[2]: the command socket, the call eventfd
        ("tags", "<u8"),  # TAG[num_tags]
        ("num_tags", "<i8"),
        ("heads", "<u8"),  # int32[num_heads]
        ("num_heads", "<i8"),
        ("job", "<u8"),  # JOB[1]
        ("record", "<u8"),  # VCPU[1]
        ("directions", "<u8"),  # DIRECTION[2]
        ("histograms", "<u8"),  # uint64[2, BUCKETS]
    ]
)
