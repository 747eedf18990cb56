"""io_uring from a kernel: push requests, submit them with one system call, reap what completed.

One thread works on a ring: the one that opened it. A ring's record is uring_layout.URING (made by
vvupipe.workers.io_uring). Nothing here looks at guest memory: who pushes has checked the addresses.
Memory order: io_uring(7), "Submission queue" and "Completion queue".
"""

import numpy as np
from numba import int32, int64, uint8, uint16, uint32, uint64

from kernels import uring_layout as layout
from kernels.jit import inlined, kernel
from kernels.memory import (
    EAGAIN,
    EBUSY,
    EINTR,
    full_fence,
    last_errno,
    libc_syscall,
    load_acquire_u32,
    load_u32,
    load_u64,
    store_release_u32,
    store_u8,
    store_u16,
    store_u32,
    store_u64,
)

_ZERO = np.uint64(0)
_SQE_BYTES = np.uint64(layout.SQE.itemsize)
_CQE_BYTES = np.uint64(layout.CQE.itemsize)
(
    _OPCODE,
    _FLAGS,
    _IOPRIO,
    _FD,
    _OFF,
    _ADDR,
    _LEN,
    _OP_FLAGS,
    _USER_DATA,
    _BUF_INDEX,
    _PERSONALITY,
    _FILE,
    _ADDR3,
    _PAD,
) = (np.uint64(layout.SQE.fields[name][1]) for name in layout.SQE.names)
_CQE_USER_DATA, _CQE_RES = (np.uint64(layout.CQE.fields[name][1]) for name in ("user_data", "res"))
_IOVEC_BYTES = np.uint64(layout.IOVEC.fields["bytes"][1])

#: The most that one request moves, as in read(2) and write(2) on Linux: MAX_RW_COUNT.
RW_BYTES_MAX = np.uint64(0x7FFFF000)
#: Completions wait for this thread to enter the kernel, and GETEVENTS is what runs them.
_RUNS_TASK_WORK = layout.SETUP_DEFER_TASKRUN | layout.SETUP_COOP_TASKRUN
_MUST_ENTER = layout.SQ_TASKRUN | layout.SQ_CQ_OVERFLOW


@kernel
def _push(uring, opcode, fd, offset, address, length, op_flags, buffer_index, user_data):
    """Write one SQE. True; False when the SQ is full, or when its completion might find no room in the CQ."""
    tail = uint32(uring.tail)
    if uint32(tail - load_acquire_u32(uring.sq_head)) >= uring.sq_entries:
        return False
    if uring.queued + uring.in_flight >= uring.cq_entries:
        return False
    sqe = uring.sqes + (uint64(tail) & uring.sq_mask) * _SQE_BYTES
    fixed = uring.fixed_file != 0
    store_u8(sqe + _OPCODE, uint8(opcode))
    store_u8(sqe + _FLAGS, uint8(layout.SQE_FIXED_FILE) if fixed else uint8(0))
    store_u16(sqe + _IOPRIO, uint16(0))
    store_u32(sqe + _FD, uint32(0) if fixed else uint32(fd))
    store_u64(sqe + _OFF, uint64(offset))
    store_u64(sqe + _ADDR, uint64(address))
    store_u32(sqe + _LEN, uint32(length))
    store_u32(sqe + _OP_FLAGS, uint32(op_flags))
    store_u64(sqe + _USER_DATA, uint64(user_data))
    store_u16(sqe + _BUF_INDEX, uint16(buffer_index))
    store_u16(sqe + _PERSONALITY, uint16(0))
    store_u32(sqe + _FILE, uint32(0))
    store_u64(sqe + _ADDR3, _ZERO)
    store_u64(sqe + _PAD, _ZERO)
    uring.tail = uint64(uint32(tail + uint32(1)))
    uring.queued += 1
    return True


@inlined
def polls(uring):
    """Whether completions are looked for at the device (IOPOLL): only plain reads and writes can be done then."""
    return uring.setup_flags & layout.SETUP_IOPOLL != 0


@inlined
def must_look(uring):
    """Whether completions come only if this thread enters the kernel: with IOPOLL, unless SQPOLL's thread does it."""
    looks = uring.setup_flags & (layout.SETUP_IOPOLL | layout.SETUP_SQPOLL)
    return looks == layout.SETUP_IOPOLL and uring.in_flight > 0


@kernel
def push_block(uring, writing, fd, address, count, offset, rw_flags, buffer_index, user_data):
    """push_rw for `count` bytes that lie in one piece."""
    count = min(count, RW_BYTES_MAX)
    if buffer_index >= 0:
        opcode = layout.OP_WRITE_FIXED if writing else layout.OP_READ_FIXED
        return _push(uring, opcode, fd, offset, address, count, rw_flags, buffer_index, user_data)
    opcode = layout.OP_WRITE if writing else layout.OP_READ
    return _push(uring, opcode, fd, offset, address, count, rw_flags, 0, user_data)


@kernel
def push_rw(uring, writing, fd, iovec_address, segments, length, offset, rw_flags, buffer_index, user_data):
    """Queue a read from, or a write to, a file at `offset`. True when there was room.

    iovec_address: `segments` (1 to 1024) of struct iovec; `length`: their bytes together, and the most that a single
    one moves. One may move less than asked for, as preadv may: no more than RW_BYTES_MAX, less at end of file.
    buffer_index: where a single segment lies in a registered buffer, which one; else -1. `fd` counts only when no file
    is registered. rw_flags: RWF_* of preadv2(2).
    The bytes must stay mapped until the completion. So must several segments' iovec: kernels without
    IORING_FEAT_SUBMIT_STABLE (before Linux 5.5), and every one with SQPOLL, read it after `submit` returned.
    """
    if segments == 1:
        address = load_u64(uint64(iovec_address))
        count = min(load_u64(uint64(iovec_address) + _IOVEC_BYTES), uint64(length))
        return push_block(uring, writing, fd, address, count, offset, rw_flags, buffer_index, user_data)
    opcode = layout.OP_WRITEV if writing else layout.OP_READV
    return _push(uring, opcode, fd, offset, uint64(iovec_address), uint64(segments), rw_flags, 0, user_data)


@kernel
def push_fsync(uring, fd, user_data):
    """Queue an fdatasync. It covers writes that have completed, not those in flight. True when there was room."""
    return _push(uring, layout.OP_FSYNC, fd, 0, _ZERO, _ZERO, layout.FSYNC_DATASYNC, 0, user_data)


@kernel
def ready(uring):
    """CQEs that `reap` would find now, without entering the kernel."""
    return int64(uint32(load_acquire_u32(uring.cq_tail) - load_u32(uring.cq_head)))


@kernel
def _enter(uring, to_submit, min_complete, flags):
    """io_uring_enter(2): SQEs that the kernel took, or -errno."""
    uring.enters += uint64(1)
    result = libc_syscall(
        int64(layout.SYS_IO_URING_ENTER), uring.fd, int64(to_submit), int64(min_complete), int64(flags), 0, 0
    )
    return result if result >= 0 else -last_errno()


@kernel
def submit(uring, wait):
    """Give the kernel everything that is queued, and wait until `wait` completions (or all there can be) are ready.

    Returns how many SQEs the kernel took, or -errno when the ring is of no more use. What it did not take for want of
    memory or of room for completions stays queued: reap, and call again. Also runs completions that wait for this
    thread, with IOPOLL looks for them at the device (Linux waits for the first one only, and looks no more before it is
    reaped); makes no system call when there is nothing to do.
    """
    store_release_u32(uring.sq_tail, uint32(uring.tail))
    if uring.setup_flags & layout.SETUP_SQPOLL:
        return _submit_polled(uring, wait)
    if polls(uring):
        wait = min(wait, 1)
    idle = uring.queued == 0 and not load_u32(uring.sq_flags) & _MUST_ENTER and not must_look(uring)
    if idle and ready(uring) >= min(wait, uring.in_flight):
        return 0
    flags = layout.ENTER_GETEVENTS if wait > 0 or uring.setup_flags & _RUNS_TASK_WORK else 0
    flags = layout.ENTER_GETEVENTS if uring.queued == 0 else flags
    taken = 0
    while True:
        result = _enter(uring, uring.queued, min(wait, uring.queued + uring.in_flight), flags)
        if result == -EINTR:
            continue
        if result < 0:
            return taken if result in (-EAGAIN, -EBUSY) else result
        uring.queued -= result
        uring.in_flight += result
        uring.submitted += uint64(result)
        taken += result
        # A wait that a signal ended, and a short count, look like success.
        if uring.queued == 0 and ready(uring) >= min(wait, uring.in_flight):
            return taken
        if result == 0 and uring.queued > 0:
            return taken


@kernel
def _submit_polled(uring, wait):
    """What `submit` does when a thread of the kernel takes SQEs by itself: wake it if it sleeps, wait if asked to."""
    taken = uring.queued
    uring.queued = 0
    uring.in_flight += taken
    uring.submitted += uint64(taken)
    target = min(wait, uring.in_flight)
    while True:
        full_fence()  # the tail before the flags: the thread sets NEED_WAKEUP, then looks at the tail once more
        state = load_u32(uring.sq_flags)
        flags = layout.ENTER_GETEVENTS if ready(uring) < target or state & layout.SQ_CQ_OVERFLOW else 0
        if state & layout.SQ_NEED_WAKEUP and load_acquire_u32(uring.sq_head) != uint32(uring.tail):
            flags |= layout.ENTER_SQ_WAKEUP
        if flags == 0:
            return taken
        result = _enter(uring, taken, target, flags)
        if result < 0 and result != -EINTR:
            return taken if result in (-EAGAIN, -EBUSY) else result
        if ready(uring) >= target:
            return taken


@kernel
def want_wakes(uring):
    """Have `event_fd` written for completions from here on. True when there is something to do already: do not sleep.

    With IOPOLL there is, as long as anything is in flight. An eventfd and not the ring's own fd: from Linux 6.3 on, a
    completion that waits for its thread (DEFER_TASKRUN) wakes nobody who sleeps in poll on that.
    """
    store_u32(uring.cq_flags, uint32(0))
    if uring.queued > 0:
        return True
    if uring.in_flight == 0 or must_look(uring):
        return uring.in_flight > 0
    full_fence()  # the flag before the look at the CQ: the kernel adds a completion, then looks at the flag
    # A work item that came before the flag has written no eventfd; entering finds it, whatever the CPU reordered.
    failed = uring.setup_flags & _RUNS_TASK_WORK and _enter(uring, 0, 0, layout.ENTER_GETEVENTS) < 0
    # Linux runs 20 work items at a time or so; while some are left it tells of no new ones.
    return failed or ready(uring) > 0 or load_u32(uring.sq_flags) & _MUST_ENTER != 0


@kernel
def refuse_wakes(uring):
    """Have no more written to `event_fd`: it costs each completion. What was written stays there: drain it."""
    store_u32(uring.cq_flags, uint32(layout.CQ_EVENTFD_DISABLED))


@kernel
def reap(uring, user_datas, results):
    """Take completions out of the CQ, as many as the arrays hold: uint64[n], and int32[n] or int64[n]. How many.

    A result is what the system call would return: bytes moved, 0, or -errno.
    """
    head = uint64(load_u32(uring.cq_head))
    count = min(ready(uring), int64(user_datas.shape[0]))
    for k in range(count):
        cqe = uring.cqes + ((head + uint64(k)) & uring.cq_mask) * _CQE_BYTES
        user_datas[k] = load_u64(cqe + _CQE_USER_DATA)
        results[k] = int32(load_u32(cqe + _CQE_RES))
    if count > 0:
        store_release_u32(uring.cq_head, uint32(head + uint64(count)))
        uring.in_flight -= count
    return count
