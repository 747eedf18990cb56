"""Mapping an fd into this process: the one place of the control plane that calls mmap.

A mapping carries its length, so that whoever computes an address from it can check bounds first.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from pathlib import Path
from types import TracebackType

_TRANSPARENT_PAGE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")


def transparent_page_bytes() -> int:
    """Bytes of a transparent huge page; 0 in a kernel without them."""
    try:
        return int(_TRANSPARENT_PAGE.read_text())
    except FileNotFoundError:
        return 0


def _alignment(fd: int) -> int:
    """Bytes to which offset and length must be rounded: the page size, or the huge page's on hugetlbfs."""
    return max(mmap.PAGESIZE, os.fstat(fd).st_blksize if _on_hugetlbfs(fd) else 0)


_HUGETLBFS_MAGIC = 0x958458F6


class _StatFs(ctypes.Structure):
    _fields_ = [("f_type", ctypes.c_long), ("rest", ctypes.c_char * 256)]


_libc = ctypes.CDLL(None, use_errno=True)


def _on_hugetlbfs(fd: int) -> bool:
    buffer = _StatFs()
    if _libc.fstatfs(fd, ctypes.byref(buffer)):
        return False
    return int(buffer.f_type) & 0xFFFFFFFF == _HUGETLBFS_MAGIC


class Mapping:
    """`size_bytes` of `fd` from `offset` on, shared with every other holder of the fd.

    The fd may be closed afterwards. `address` is where the first byte is in this process; `view` is a writable
    memoryview of exactly those bytes (read-only if `writable` is False).

    huge: whole huge pages are mapped, and the kernel is asked to give transparent ones (MADV_HUGEPAGE) to what is
    touched here first; the file must be long enough. A hugetlbfs file needs no asking, its pages are huge anyway.

    Raises: ValueError when the file is shorter than what is asked for, OSError when mmap fails.
    """

    def __init__(self, fd: int, size_bytes: int, offset: int = 0, *, writable: bool = True, huge: bool = False) -> None:
        align = _alignment(fd)
        advise = huge and align == mmap.PAGESIZE and transparent_page_bytes() > 0
        if advise:
            align = transparent_page_bytes()
        start = offset - offset % align
        slack = offset - start
        length = -(-(slack + size_bytes) // align) * align
        if align == mmap.PAGESIZE:
            length = slack + size_bytes  # lets mmap.mmap compare with the true file size
        prot = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self._mmap: mmap.mmap | None = mmap.mmap(fd, length, flags=mmap.MAP_SHARED, prot=prot, offset=start)
        if advise:
            self._mmap.madvise(mmap.MADV_HUGEPAGE)
        whole = memoryview(self._mmap)
        self.view = whole[slack : slack + size_bytes]
        whole.release()
        self.size_bytes = size_bytes
        # SAFETY: the address stays valid as long as this object holds the mmap; close() ends both together.
        self.address = _buffer_address(self.view)

    def close(self) -> None:
        """Unmap; the address is dead from here on.

        Views taken from `view` keep the memory itself alive until the last of them is gone.
        """
        if self._mmap is not None:
            mapped, self._mmap = self._mmap, None
            self.address = 0
            with contextlib.suppress(BufferError):
                self.view.release()
                mapped.close()

    def __enter__(self) -> Mapping:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _PyBuffer(ctypes.Structure):
    """CPython's Py_buffer (Include/cpython/pybuffer.h), of which only `buf` is used."""

    _fields_ = [
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    ]


def _buffer_address(view: memoryview) -> int:
    """Address of a memoryview's first byte, also of a read-only one (ctypes' from_buffer takes no read-only)."""
    buffer = _PyBuffer()
    api = ctypes.pythonapi
    api.PyObject_GetBuffer.argtypes = [ctypes.py_object, ctypes.POINTER(_PyBuffer), ctypes.c_int]
    api.PyObject_GetBuffer(view, ctypes.byref(buffer), 0)
    address = buffer.buf
    api.PyBuffer_Release.argtypes = [ctypes.POINTER(_PyBuffer)]
    api.PyBuffer_Release(ctypes.byref(buffer))
    assert address is not None
    return int(address)
