"""SIGBUS without dying: a shared mapping faults when it is touched where its file was truncated, or has no room.

The handler puts an empty page where the fault was, so that the instruction goes on, and counts. In the device's own
file: whoever copied compares the count afterwards and takes the slow way. In guest memory, for which there is no other
way: no request is answered any more (blk_answer), the rings are broken (blk_worker), and the worker makes way for
another one when a ring is started, as the page stays empty (vvupipe.workers.process). It only makes system calls and
stores: async-signal-safe.
"""

import numpy as np
from numba import int32, int64, uint64

from kernels import control_block as cb
from kernels.bus_error_page import FILE_BYTES, FILE_START, RECORD_PAGE, SIGBUS
from kernels.jit import kernel
from kernels.memory import add_u64, end_process, libc_mmap, load_u64

_SI_ADDR = np.uint64(16)  # offset of si_addr in siginfo_t on 64-bit Linux
_PAGE_BYTES = np.uint64(4096)
_HUGE_PAGE_BYTES = np.uint64(2 << 20)  # guest memory of hugetlbfs is replaced by whole pages
_PROT_READ_WRITE = np.int32(3)
_MAP_PRIVATE_FIXED_ANONYMOUS = np.int32(0x32)
_MAP_FAILED = np.uint64(0xFFFFFFFFFFFFFFFF)
_FILE_ERRORS = np.uint64(cb.offset_of(cb.WORKER, "bus_errors"))
_MEMORY_ERRORS = np.uint64(cb.offset_of(cb.WORKER, "memory_errors"))
_EXIT_STATUS = 128 + SIGBUS
_ONE = np.uint64(1)


@kernel
def put_empty_page(fault, size):
    """Map `size` bytes of zeros, a power of two, around an address. True when that worked."""
    page = fault & ~(size - _ONE)
    found = libc_mmap(page, size, _PROT_READ_WRITE, _MAP_PRIVATE_FIXED_ANONYMOUS, int32(-1), int64(0))
    return found != _MAP_FAILED


@kernel
def survive_bus_error(info):
    """Count in the worker's record. info: address of the siginfo_t."""
    fault = load_u64(info + _SI_ADDR)
    if not put_empty_page(fault, _PAGE_BYTES) and not put_empty_page(fault, _HUGE_PAGE_BYTES):
        # The instruction would fault for ever; the coordinator replaces a worker that ends.
        end_process(int32(_EXIT_STATUS))
    record = load_u64(uint64(RECORD_PAGE))
    in_file = fault - load_u64(uint64(RECORD_PAGE + FILE_START)) < load_u64(uint64(RECORD_PAGE + FILE_BYTES))
    add_u64(record + (_FILE_ERRORS if in_file else _MEMORY_ERRORS), _ONE)
