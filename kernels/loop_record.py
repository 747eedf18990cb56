"""What a worker's loop waits on and keeps of its waiting. Plain, no numba."""

import numpy as np

#: struct pollfd (poll(2)); entry 0 is the command socket, entry k + 1 the kick of ring k, then come the device's own.
POLLFD = np.dtype([("fd", "<i4"), ("events", "<i2"), ("revents", "<i2")])
POLLIN = 1

#: What the loop needs besides its rings; one record, private to the process.
LOOP = np.dtype(
    [
        ("record", "<u8"),  # address of the worker's control_block.WORKER
        ("scratch", "<u8"),  # 64 bytes of this process
        ("one", "<u8"),  # address of a 64-bit 1
        ("notice_fd", "<i8"),  # eventfd that tells the coordinator to look at the control block
        ("spin_max_ns", "<i8"),  # longest time to spin before sleeping; 0 never spins
        ("spin_ns", "<i8"),  # the present one, adapted to what happened
        ("idle_since_ns", "<i8"),  # when the present spell without work began
        ("spins", "<i8"),  # looks since then
        ("polite", "<i8"),  # 1 when spinning has lasted so long that others may have the CPU
        ("running", "<i8"),  # rings that ran when the kernel was entered; a command makes more of them, nothing else
        ("hot", "<i8"),  # the one of them that had work last
        ("since_all", "<i8"),  # looks and requests since all of them were looked at
        ("stages", "<u8"),  # address of the worker's stage_layout.STAGE_RECORD; 0 when stages are not counted
        ("attention_seen", "<u4"),
        ("_pad", "<u4"),
    ]
)
