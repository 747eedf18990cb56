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
        ("packed", "<i8"),  # 1 when VIRTIO_F_RING_PACKED was negotiated: the indices hold wrap bits
        ("iotlb", "<i8"),  # 1 when addresses of the driver are translated, so that a missing one may come later
        ("event_idx", "<i8"),  # 1 when VIRTIO_F_RING_EVENT_IDX was negotiated
        ("indirect", "<i8"),  # 1 when VIRTIO_F_RING_INDIRECT_DESC was negotiated
        ("in_order", "<i8"),  # 1 when VIRTIO_F_IN_ORDER was negotiated: nothing is taken while something is under way
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
        ("log_address", "<u8"),  # dirty-page log in this process
        ("log_bytes", "<u8"),  # 0: nothing is logged
        ("log_gpa", "<u8"),  # where writes to the used ring are logged
        ("log_used", "<i8"),  # 1: they are
        ("log_fd", "<i8"),  # eventfd that tells of new entries in the log; -1: none
        ("inflight", "<u8"),  # address of the vring's part of the inflight region; 0: none
        ("counter", "<u8"),  # the region's global counter
        ("resubmit", "<u8"),  # address of int64[resubmit_count]: chains that a former back-end took and did not finish
        ("resubmit_count", "<i8"),
        ("resubmit_next", "<i8"),
        ("slots", "<i8"),  # descriptors of the ring that the chain in hand takes (packed)
        ("buffer_id", "<i8"),  # its id (packed)
        ("entry", "<i8"),  # its head entry of the inflight region (packed)
        ("unsignalled", "<i8"),  # descriptors used since the last decision about a call (packed)
        ("unpublished", "<i8"),  # chains given back since the last `publish`
        ("under_way", "<i8"),  # chains taken that somebody else is doing (kernels.request)
        ("blocked", "<i8"),  # 1 when chains wait in the ring for something under way to end
        ("header", "<u8"),  # of the last request that came alone: the driver is likely to put the next one there too
        ("requests", "<u8"),
        ("errors", "<u8"),
        ("read_bytes", "<u8"),
        ("written_bytes", "<u8"),
        ("flushes", "<u8"),
        ("kicks", "<u8"),
        ("calls", "<u8"),
        ("turns", "<u8"),
        ("waiting_sum", "<u8"),
    ],
    align=True,
)

#: Chains that are looked at together.
CHAINS_MAX = 16

#: A chain of the usual shape (kernels.usual_chain) that was looked at, before and after it is taken.
CHAIN = np.dtype(
    [
        ("head", "<i8"),  # what a split ring knows it by
        ("slots", "<i8"),  # RING's fields of these names (packed)
        ("buffer_id", "<i8"),
        ("entry", "<i8"),
        ("copied", "<i8"),  # first row of the copy of its descriptors (packed)
        ("table", "<u8"),  # address of the descriptors that `index` counts
        ("index", "<i8"),  # of the first descriptor with a buffer
        ("entries", "<i8"),  # of the table
        ("first", "<u8"),  # its buffers' addresses in this process: the readable one,
        ("data", "<u8"),  # the one of either kind,
        ("data_bytes", "<u8"),
        ("data_writable", "<i8"),
        ("last", "<u8"),  # and the writable one
        ("kind", "<i8"),  # of the request in it: BLK_T_*
        ("sector", "<u8"),
        ("status", "<i8"),  # what is to be done with it, or how it ended: kernels.status
    ],
    align=True,
)
