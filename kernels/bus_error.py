"""SIGBUS without dying: a shared mapping whose file was truncated faults when it is touched.

The handler puts an empty page where the fault was, so that the instruction goes on, and counts; whoever copied
compares the count afterwards and takes the slow way. It only makes system calls and stores: async-signal-safe.
"""

import numpy as np
from numba import int32, int64

from kernels import control_block as cb
from kernels.bus_error_page import RECORD_PAGE, SIGBUS
from kernels.jit import kernel
from kernels.memory import end_process, libc_mmap, load_u64, store_u64

_SI_ADDR = np.uint64(16)  # offset of si_addr in siginfo_t on 64-bit Linux
_PAGE_MASK = np.uint64(0xFFFFFFFFFFFFF000)
_PAGE_BYTES = np.uint64(4096)
_PROT_READ_WRITE = np.int32(3)
_MAP_PRIVATE_FIXED_ANONYMOUS = np.int32(0x32)
_MAP_FAILED = np.uint64(0xFFFFFFFFFFFFFFFF)
_COUNT = np.uint64(cb.offset_of(cb.WORKER, "bus_errors"))
_ADDRESS = np.uint64(cb.offset_of(cb.WORKER, "bus_error_address"))
_EXIT_STATUS = 128 + SIGBUS


@kernel
def survive_bus_error(info):
    """Count in the worker's record. info: address of the siginfo_t."""
    fault = load_u64(info + _SI_ADDR)
    page = fault & _PAGE_MASK
    mapped = libc_mmap(page, _PAGE_BYTES, _PROT_READ_WRITE, _MAP_PRIVATE_FIXED_ANONYMOUS, int32(-1), int64(0))
    if mapped == _MAP_FAILED:
        # The instruction would fault for ever; the coordinator replaces a worker that ends.
        end_process(int32(_EXIT_STATUS))
    record = load_u64(np.uint64(RECORD_PAGE))
    store_u64(record + _ADDRESS, fault)
    store_u64(record + _COUNT, load_u64(record + _COUNT) + np.uint64(1))
