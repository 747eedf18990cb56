"""io_uring: structures and constants of <linux/io_uring.h>, and the record of a ring. Plain dtypes, no numba."""

import numpy as np

#: System call numbers, the same on every architecture (alpha aside).
SYS_IO_URING_SETUP = 425
SYS_IO_URING_ENTER = 426
SYS_IO_URING_REGISTER = 427

#: struct io_uring_sqe; the unions by the names that reads, writes, fsync and fallocate use.
SQE = np.dtype(
    [
        ("opcode", "u1"),
        ("flags", "u1"),
        ("ioprio", "u2"),
        ("fd", "i4"),
        ("off", "u8"),
        ("addr", "u8"),
        ("len", "u4"),
        ("op_flags", "u4"),  # rw_flags, fsync_flags
        ("user_data", "u8"),
        ("buf_index", "u2"),
        ("personality", "u2"),
        ("splice_fd_in", "i4"),
        ("addr3", "u8"),
        ("_pad", "u8"),
    ]
)
assert SQE.itemsize == 64

#: struct io_uring_cqe
CQE = np.dtype([("user_data", "u8"), ("res", "i4"), ("flags", "u4")])
assert CQE.itemsize == 16

_SQ_OFFSETS = np.dtype(
    [(name, "u4") for name in ("head", "tail", "ring_mask", "ring_entries", "flags", "dropped", "array", "resv1")]
    + [("resv2", "u8")]
)
_CQ_OFFSETS = np.dtype(
    [(name, "u4") for name in ("head", "tail", "ring_mask", "ring_entries", "overflow", "cqes", "flags", "resv1")]
    + [("resv2", "u8")]
)
#: struct io_uring_params
PARAMS = np.dtype(
    [
        ("sq_entries", "u4"),
        ("cq_entries", "u4"),
        ("flags", "u4"),
        ("sq_thread_cpu", "u4"),
        ("sq_thread_idle", "u4"),  # milliseconds
        ("features", "u4"),
        ("wq_fd", "u4"),
        ("resv", "u4", 3),
        ("sq_off", _SQ_OFFSETS),
        ("cq_off", _CQ_OFFSETS),
    ]
)
assert PARAMS.itemsize == 120

#: struct io_uring_probe with room for every opcode that a byte can name
PROBE_OP = np.dtype([("op", "u1"), ("resv", "u1"), ("flags", "u2"), ("resv2", "u4")])
PROBE_OPS_MAX = 256
PROBE = np.dtype(
    [("last_op", "u1"), ("ops_len", "u1"), ("resv", "u2"), ("resv2", "u4", 3), ("ops", PROBE_OP, PROBE_OPS_MAX)]
)
assert PROBE.itemsize == 16 + 8 * PROBE_OPS_MAX
OP_SUPPORTED = 1 << 0  # IO_URING_OP_SUPPORTED

#: struct iovec
IOVEC = np.dtype([("address", "u8"), ("bytes", "u8")])

OP_READV = 1
OP_WRITEV = 2
OP_FSYNC = 3
OP_READ_FIXED = 4
OP_WRITE_FIXED = 5
OP_READ = 22
OP_WRITE = 23

SQE_FIXED_FILE = 1 << 0  # IOSQE_FIXED_FILE
FSYNC_DATASYNC = 1 << 0

SETUP_IOPOLL = 1 << 0
SETUP_SQPOLL = 1 << 1
SETUP_CQSIZE = 1 << 3
SETUP_SUBMIT_ALL = 1 << 7  # Linux 5.18
SETUP_COOP_TASKRUN = 1 << 8  # 5.19
SETUP_TASKRUN_FLAG = 1 << 9  # 5.19
SETUP_SINGLE_ISSUER = 1 << 12  # 6.0
SETUP_DEFER_TASKRUN = 1 << 13  # 6.1

OFF_SQ_RING = 0
OFF_CQ_RING = 0x8000000
OFF_SQES = 0x10000000

FEAT_SINGLE_MMAP = 1 << 0

SQ_NEED_WAKEUP = 1 << 0
SQ_CQ_OVERFLOW = 1 << 1
SQ_TASKRUN = 1 << 2

CQ_EVENTFD_DISABLED = 1 << 0  # Linux 5.8

ENTER_GETEVENTS = 1 << 0
ENTER_SQ_WAKEUP = 1 << 1

REGISTER_BUFFERS = 0
UNREGISTER_BUFFERS = 1
REGISTER_FILES = 2
UNREGISTER_FILES = 3
REGISTER_EVENTFD = 4
REGISTER_PROBE = 8

ENTRIES_MAX = 32768  # io_uring_setup(2)
BUFFER_BYTES_MAX = 1 << 30  # io_uring_register(2), IORING_REGISTER_BUFFERS
BUFFERS_MAX = 16384

#: A ring as the process that owns it keeps it: made by workers.io_uring, worked on by kernels.uring.
URING = np.dtype(
    [
        ("fd", "<i8"),  # of the ring; -1: no ring
        ("event_fd", "<i8"),  # eventfd to sleep on: readable when a completion is due after `want_wakes`
        ("fixed_file", "<i8"),  # 1: one file is registered, as index 0, and every request is for it
        ("setup_flags", "<i8"),  # SETUP_*
        ("sq_head", "<u8"),  # addresses in this process
        ("sq_tail", "<u8"),
        ("sq_flags", "<u8"),
        ("sq_dropped", "<u8"),
        ("sqes", "<u8"),
        ("sq_mask", "<u8"),
        ("sq_entries", "<i8"),
        ("cq_head", "<u8"),  # addresses in this process
        ("cq_tail", "<u8"),
        ("cq_flags", "<u8"),
        ("cq_overflow", "<u8"),
        ("cqes", "<u8"),
        ("cq_mask", "<u8"),
        ("cq_entries", "<i8"),
        ("tail", "<u8"),  # where the next SQE goes; the kernel is shown it by `submit`
        ("queued", "<i8"),  # SQEs pushed and not submitted yet
        ("in_flight", "<i8"),  # submitted and not reaped yet
        ("enters", "<u8"),  # io_uring_enter calls made
        ("submitted", "<u8"),  # requests that the kernel has taken
    ]
)
