"""The handler of SIGBUS in a worker (kernels/bus_error.py): put in place, and told of the device's mapped file."""

from __future__ import annotations

import ctypes
import mmap

from kernels.bus_error_page import FILE_BYTES, FILE_START, RECORD_PAGE, RECORD_PAGE_BYTES, SIGBUS

_SA_SIGINFO = 4  # sigaction(2)
_MAP_FIXED_NOREPLACE = 0x100000  # mmap(2)


class _SigAction(ctypes.Structure):
    """glibc's struct sigaction."""

    _fields_ = [
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ulong * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    ]


def install(handler: int, worker_address: int) -> None:
    """Have the compiled function at `handler` called, once in a process. worker_address: of its control_block.WORKER.

    Raises: OSError.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED_NOREPLACE
    size = ctypes.c_size_t(RECORD_PAGE_BYTES)
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    if libc.mmap(ctypes.c_void_p(RECORD_PAGE), size, protection, flags, -1, ctypes.c_long(0)) != RECORD_PAGE:
        raise OSError(ctypes.get_errno(), "no page for the SIGBUS handler")
    _store(0, worker_address)
    action = _SigAction(handler=handler, flags=_SA_SIGINFO)
    if libc.sigaction(SIGBUS, ctypes.byref(action), None):
        raise OSError(ctypes.get_errno(), "no handler for SIGBUS")


def set_mapped_file(address: int, size_bytes: int) -> None:
    """Tell the handler, which is installed, where the device's own file is mapped; no bytes: nowhere."""
    _store(FILE_BYTES, 0)
    _store(FILE_START, address)
    _store(FILE_BYTES, size_bytes)


def _store(offset: int, number: int) -> None:
    # SAFETY: `install` has mapped the page, and it stays.
    ctypes.c_uint64.from_address(RECORD_PAGE + offset).value = number
