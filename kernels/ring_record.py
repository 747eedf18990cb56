"""A vring as its worker keeps it: private to the process, addresses translated and checked at the start."""

import numpy as np

RING = np.dtype(
    [
        ("desc", "<u8"),  # addresses in this process
        ("avail", "<u8"),
        ("used", "<u8"),
        ("record", "<u8"),  # address of the vring's control_block.VRING
        ("size", "<i8"),
        ("index", "<i8"),  # number of the vring at its front-end
        ("event_idx", "<i8"),  # 1 when VIRTIO_F_RING_EVENT_IDX was negotiated
        ("indirect", "<i8"),  # 1 when VIRTIO_F_RING_INDIRECT_DESC was negotiated
        ("write_through", "<i8"),  # 1 when the driver has no way to flush: every write goes to the disk first
        ("kick_fd", "<i4"),  # -1: none, the ring is polled
        ("call_fd", "<i4"),  # -1: none
        ("err_fd", "<i4"),  # -1: none
        ("state", "<i4"),  # control_block.VRING_*
        ("last_avail_idx", "<u2"),
        ("used_idx", "<u2"),
        ("signalled_idx", "<u2"),  # used_idx at the last decision about a call
        ("signalled_valid", "<u2"),
        ("error", "<i4"),
        ("_pad", "<i4"),
        ("requests", "<u8"),
        ("errors", "<u8"),
        ("read_bytes", "<u8"),
        ("written_bytes", "<u8"),
        ("flushes", "<u8"),
        ("kicks", "<u8"),
        ("calls", "<u8"),
    ],
    align=True,
)
