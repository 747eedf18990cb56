"""io_uring's system calls for the control plane, and why they may be refused (io_uring_setup(2))."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kernels import uring_layout as layout

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

TOO_OLD = "this kernel is too old (before 5.8)"
_DISABLED = Path("/proc/sys/kernel/io_uring_disabled")  # Linux 6.6: 1 to those outside io_uring_group, 2 to all


def system_call(number: int, *arguments: int) -> int:
    """Make a system call. Raises: OSError."""
    result = int(_libc.syscall(ctypes.c_long(number), *(ctypes.c_long(argument) for argument in arguments)))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def set_up(entries: int, parameters: npt.NDArray[np.void]) -> int:
    """io_uring_setup(2): the fd of a ring with `entries` SQEs; fills in `parameters` (layout.PARAMS[1])."""
    return system_call(layout.SYS_IO_URING_SETUP, entries, parameters.ctypes.data)


def register(fd: int, operation: int, table: npt.NDArray[np.generic] | None, count: int) -> int:
    """io_uring_register(2): `operation` (layout.REGISTER_*) with `count` entries of `table`."""
    return system_call(layout.SYS_IO_URING_REGISTER, fd, operation, 0 if table is None else table.ctypes.data, count)


def reason(error: OSError) -> str:
    """Why a ring could not be set up, in a few words."""
    if error.errno == errno.ENOSYS:
        return "this kernel has none, or seccomp hides it" if _seccomp_filters() else "this kernel has none"
    if error.errno in (errno.EPERM, errno.EACCES):
        if _switched_off():
            return "io_uring is switched off (kernel.io_uring_disabled)"
        if _seccomp_filters():
            return "blocked by seccomp (as in Docker)"
        return "this kernel forbids it (a security module?)"
    if error.errno == errno.ENOMEM:
        return "no memory for it (raise the limit of locked memory, ulimit -l)"
    if error.errno == errno.EOPNOTSUPP:
        return TOO_OLD
    return os.strerror(error.errno or 0)


def _switched_off() -> bool:
    try:
        return _DISABLED.read_text().strip() not in ("", "0")
    except OSError:
        return False  # a kernel before 6.6 has no such switch


def _seccomp_filters() -> bool:
    """Whether a filter looks at this process's system calls (proc(5), "Seccomp" in /proc/pid/status)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("Seccomp:"):
            return line.split()[1] == "2"
    return False
