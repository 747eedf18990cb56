"""What the handler of SIGBUS (kernels/bus_error.py) finds at a fixed address. Plain, no numba."""

SIGBUS = 7

#: Address of a page that the process maps there; a fixed one, so that the compiled handler can come from the cache: a
#: signal handler has no argument of its own. It holds three uint64: the address of the control_block.WORKER; where the
#: device's own file is mapped, whose faults it sees to; and how many bytes of it.
RECORD_PAGE = 0x6276_7570_0000
RECORD_PAGE_BYTES = 4096
FILE_START = 8
FILE_BYTES = 16
