"""The control block: what coordinator and workers share about each worker and vring. Plain dtypes, no numba.

One block serves one back-end: `workers` records, then `vrings` records, then, when stages are counted, a STAGE_RECORD
for each worker; all 128-byte aligned so that two writers never share a cache line. At its very end is one SHAPE. Every
field has one writer: the coordinator ("C") or the worker that serves the vring ("W").
"""

import numpy as np

from kernels.stage_layout import STAGE_RECORD

WORKER = np.dtype(
    [
        ("attention", "<u4"),  # C: differs from what the worker last saw when a command waits
        ("heartbeat", "<u4"),  # W: counts entries into the kernel
        ("bus_errors", "<u8"),  # W: SIGBUS caught in the device's own file (it shrank, or its disk is full)
        ("memory_errors", "<u8"),  # W: SIGBUS caught elsewhere, in guest memory, since this process began
        ("sleeps", "<u8"),  # W: times it slept for lack of work
        ("disk_errors", "<u8"),  # W: system calls on the device's file that failed for good
        ("disk_errno", "<u4"),  # W: what the last one of them said
        ("_pad", "V84"),
    ]
)
assert WORKER.itemsize == 128

VRING_STOPPED = 0
VRING_RUNNING = 1
VRING_WAITING = 3  # for a translation that the IOTLB lacks (miss_iova, miss_access)
VRING_BROKEN = 2  # the driver broke the ring; stopped until the front-end starts it again

VRING = np.dtype(
    [
        ("state", "<u4"),  # W: VRING_*
        ("error", "<i4"),  # W: kernels.status code that broke it
        ("last_avail_idx", "<u2"),  # W: next available entry to take
        ("used_idx", "<u2"),  # W: next used entry to write
        ("_pad0", "V4"),
        ("requests", "<u8"),  # W: requests completed, errors included
        ("errors", "<u8"),  # W: of them, those that got another status than OK
        ("read_bytes", "<u8"),  # W
        ("written_bytes", "<u8"),  # W
        ("flushes", "<u8"),  # W
        ("kicks", "<u8"),  # W: kicks received
        ("calls", "<u8"),  # W: calls sent
        ("miss_iova", "<u8"),  # W: the address that VRING_WAITING waits for
        ("miss_access", "<u4"),  # W: and what for: 1 read, 2 write
        ("under_way", "<u4"),  # W: requests that were taken and that the kernel or a helper is doing
        ("turns", "<u8"),  # W: times that the worker found requests here; requests / turns is the batch
        ("waiting_sum", "<u8"),  # W: requests found waiting, added up over `turns`
        ("_pad1", "V24"),
    ]
)
assert VRING.itemsize == 128

SHAPE_MAGIC = 0x6B6C62_6C727463  # "ctrlblk" in memory
#: The last bytes of a block: who finds one, as perf/live_view.py does, learns what is in it.
SHAPE = np.dtype(
    [
        ("magic", "<u8"),  # C, as all of it
        ("num_workers", "<u4"),
        ("num_vrings", "<u4"),
        ("num_stage_records", "<u4"),  # as many as workers, or none
        ("_pad", "V4"),
    ]
)


def block_bytes(num_workers: int, num_vrings: int, num_stage_records: int) -> int:
    """Size of a block, a whole number of pages."""
    records = num_workers * WORKER.itemsize + num_vrings * VRING.itemsize + num_stage_records * STAGE_RECORD.itemsize
    return -(-(records + SHAPE.itemsize) // 4096) * 4096


def offset_of(record: np.dtype, field: str) -> int:
    """Byte offset of a field in its record, for kernels, which follow addresses."""
    return int(record.fields[field][1])
