"""Whether a file's device can be polled for completions of direct I/O (io_uring_setup(2), IORING_SETUP_IOPOLL)."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import stat
import time

import numpy as np

from kernels import uring_layout as layout
from vvupipe.devices.block import image_limits
from vvupipe.workers import io_uring_calls as calls
from vvupipe.workers.io_uring import IoUring

_PATIENCE_S = 5.0  # for one read


def missing(fd: int, block_bytes: int) -> str | None:
    """None when direct I/O to `fd`, opened with O_DIRECT, can be polled for; else why not, in a few words.

    One block of block_bytes, the alignment of O_DIRECT, is read to find out. Raises: OSError when that cannot be asked.
    """
    if _has_polled_queues(os.fstat(fd)) is False:
        return "its device has no polled queues (nvme.poll_queues=N or virtio_blk.poll_queues=N makes some)"
    try:
        ring = IoUring.open(1, iopoll=True)
    except OSError as error:
        return calls.reason(error)
    with ring:
        result = _read(ring, fd, block_bytes)
    if result is None:
        return f"a read did not come back in {_PATIENCE_S:g} s"
    return None if result >= 0 else f"a read failed: {os.strerror(-result)}"


def _has_polled_queues(status: os.stat_result) -> bool | None:
    """What sysfs says of the disk behind a file; None when it says nothing, as for a file system on several disks."""
    number = status.st_rdev if stat.S_ISBLK(status.st_mode) else status.st_dev
    try:
        # A device without them completes such requests by interrupts in some versions of Linux, and nobody tells.
        return (image_limits.queue_folder(number) / "io_poll").read_text().strip() == "1"
    except OSError:
        return None


def _read(ring: IoUring, fd: int, block_bytes: int) -> int | None:
    """What reading the first block comes to, -errno when it fails; None when it takes too long."""
    record = ring.record[0]
    memory = mmap.mmap(-1, max(block_bytes, mmap.PAGESIZE))
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    request = np.zeros(1, layout.SQE)
    request["opcode"], request["fd"], request["addr"], request["len"] = layout.OP_READ, fd, address, block_bytes
    ctypes.memmove(int(record["sqes"]), request.ctypes.data, request.nbytes)
    ctypes.c_uint32.from_address(int(record["sq_tail"])).value = 1
    head, tail = (ctypes.c_uint32.from_address(int(record[name])) for name in ("cq_head", "cq_tail"))
    submitting, deadline = 1, time.monotonic() + _PATIENCE_S
    while head.value == tail.value:
        if time.monotonic() > deadline:
            _KEPT.append(memory)
            return None
        with contextlib.suppress(InterruptedError, BlockingIOError):  # once more
            submitting -= calls.system_call(
                layout.SYS_IO_URING_ENTER, ring.fd, submitting, 0, layout.ENTER_GETEVENTS, 0, 0
            )
    completion = np.zeros(1, layout.CQE)
    ctypes.memmove(completion.ctypes.data, int(record["cqes"]), completion.nbytes)
    return int(completion["res"][0])


_KEPT: list[mmap.mmap] = []  # Linux may write there yet
