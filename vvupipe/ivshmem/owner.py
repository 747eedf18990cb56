"""How the server learns that the driver's process died: a robust futex in the shared memory.

Linux marks the robust futexes of a thread that ends, however it ends, with FUTEX_OWNER_DIED (robust-futexes.rst,
set_robust_list(2)). The word lies in the shared memory, so whoever looks at it from outside of the guest sees that.
"""

from __future__ import annotations

import ctypes
import os
import platform
import threading

from vvupipe.errors import TransportError
from vvupipe.ivshmem import layout

# linux/futex.h
_OWNER_DIED = 0x40000000
_TID_MASK = 0x3FFFFFFF
_SET_ROBUST_LIST = {"x86_64": 273, "aarch64": 99}  # the system call's number
_WORD_BYTES = 4


class OwnerWatch:
    """The server's side: looks at the word in `memory` (the whole shared memory)."""

    def __init__(self, memory: memoryview) -> None:
        self._word = memory[layout.OWNER_OFFSET : layout.OWNER_OFFSET + _WORD_BYTES].cast("I")

    def died(self) -> bool:
        """Whether an owner died since the last time."""
        if not self._word[0] & _OWNER_DIED:
            return False
        self._word[0] = 0
        return True

    def clear(self) -> None:
        """There is no owner."""
        self._word[0] = 0

    def close(self) -> None:
        """Let go of the memory."""
        self._word.release()


class _RobustList(ctypes.Structure):
    """struct robust_list_head with its one entry behind it."""

    _fields_ = [
        ("next", ctypes.c_uint64),
        ("futex_offset", ctypes.c_int64),
        ("pending", ctypes.c_uint64),
    ]


class Ownership:
    """The driver's side: this process is the owner from here to `close`, or to its end.

    A thread of its own holds the futex, since a thread has one robust list and the C library uses that of the others.
    The list is the head alone with its `list_op_pending` pointing so that the futex word comes out: the kernel looks
    at that one too.
    """

    def __init__(self, memory: memoryview, memory_address: int) -> None:
        """memory: the whole shared memory, mapped at `memory_address`. Raises: TransportError."""
        number = _SET_ROBUST_LIST.get(platform.machine())
        if number is None:
            raise TransportError(f"no robust futexes known for {platform.machine()}")
        self._number = number
        self._word = memory[layout.OWNER_OFFSET : layout.OWNER_OFFSET + _WORD_BYTES].cast("I")
        self._head = _RobustList()
        address = ctypes.addressof(self._head)
        # SAFETY: head and word live as long as the thread, which `close` joins before either goes.
        self._head.next = address  # an empty list
        self._head.futex_offset = memory_address + layout.OWNER_OFFSET - address
        self._head.pending = address
        self._ready = threading.Event()
        self._end = threading.Event()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._hold, name="ivshmem-owner", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._error:
            raise TransportError(f"cannot watch over this process: {self._error}") from self._error

    def _hold(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        size = ctypes.c_size_t(ctypes.sizeof(self._head))
        if libc.syscall(ctypes.c_long(self._number), ctypes.byref(self._head), size):
            self._error = OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        else:
            self._word[0] = threading.get_native_id() & _TID_MASK
        self._ready.set()
        self._end.wait()
        self._word[0] = 0  # an orderly end: nobody died

    def close(self) -> None:
        """End it in good order; harmless when called again."""
        if not self._end.is_set():
            self._end.set()
            self._thread.join()
            self._word.release()
