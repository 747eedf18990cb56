"""SIGBUS without dying: a shared mapping whose file was truncated faults when it is touched.

The handler puts an empty page where the fault was, so that the instruction goes on, and counts; whoever copied
compares the count afterwards and takes the slow way. It only makes system calls and stores: async-signal-safe.
"""

import numpy as np
from numba import cfunc, types

from kernels import control_block as cb
from kernels.memory import end_process, libc_mmap, load_u64, store_u64

SIGBUS = 7
_SI_ADDR = np.uint64(16)  # offset of si_addr in siginfo_t on 64-bit Linux
_PAGE_MASK = np.uint64(0xFFFFFFFFFFFFF000)
_PAGE_BYTES = np.uint64(4096)
_PROT_READ_WRITE = np.int32(3)
_MAP_PRIVATE_FIXED_ANONYMOUS = np.int32(0x32)
_MAP_FAILED = np.uint64(0xFFFFFFFFFFFFFFFF)
_COUNT = np.uint64(cb.offset_of(cb.WORKER, "bus_errors"))
_ADDRESS = np.uint64(cb.offset_of(cb.WORKER, "bus_error_address"))
_EXIT_STATUS = 128 + SIGBUS


def make_handler(record_address):
    """A compiled `sa_sigaction` that counts in the control_block.WORKER at `record_address` (fixed from then on).

    Keep the returned object: the kernel holds only its `address`.
    """
    count = np.uint64(record_address) + _COUNT
    last = np.uint64(record_address) + _ADDRESS

    @cfunc(types.void(types.int32, types.uint64, types.uint64))
    def on_bus_error(signal_number, info, context):
        fault = load_u64(info + _SI_ADDR)
        page = fault & _PAGE_MASK
        mapped = libc_mmap(page, _PAGE_BYTES, _PROT_READ_WRITE, _MAP_PRIVATE_FIXED_ANONYMOUS, np.int32(-1), np.int64(0))
        if mapped == _MAP_FAILED:
            # The instruction would fault for ever; the coordinator replaces a worker that ends.
            end_process(np.int32(_EXIT_STATUS))
        store_u64(last, fault)
        store_u64(count, load_u64(count) + np.uint64(1))

    return on_bus_error
