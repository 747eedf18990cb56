"""Where the handler of SIGBUS finds its worker (kernels/bus_error.py). Plain, no numba."""

SIGBUS = 7

#: Address of a page that the process maps there; its first word is the address of its control_block.WORKER. A fixed
#: one, so that the compiled handler can come from the cache: a signal handler has no argument of its own.
RECORD_PAGE = 0x6276_7570_0000
RECORD_PAGE_BYTES = 4096
