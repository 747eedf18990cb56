"""The shared memory of a function carried by ivshmem-doorbell. docs/ivshmem.md is the specification.

The numbers of the device itself are those of QEMU's docs/specs/ivshmem-spec.rst. All little-endian.
"""

from __future__ import annotations

import struct

# ivshmem-spec.rst, "Device identity", "PCI configuration", "Interrupts"
VENDOR_ID = 0x1AF4
DEVICE_ID = 0x1110
BAR_REGISTERS = 0
BAR_MEMORY = 2
REGISTER_DOORBELL = 12  #: le32: peer << 16 | vector

# Peers of the server: the guest is the first one that QEMU hears of
PEER_GUEST = 0
PEER_MAILBOX = 1  #: its vector 0: a request waits in the mailbox
PEER_EVENTS = 2  #: and those after it: the I/O events of the table, EVENTS_PER_PEER each

# The guest's vectors
VECTOR_MAILBOX = 0  #: the answer is there
VECTOR_FIRST_IRQ = 1  #: MSI-X vector k of the carried function is vector 1 + k

MEMORY_BYTES = 1 << 20

# Header: written by the server before the guest runs, read-only for the driver
HEADER_OFFSET = 0
MAGIC = b"vvupipe-ivshmem\0"
VERSION = 1
HEADER = struct.Struct("<16sIIIIIII")  #: magic, version, mailbox, owner, DMA area, its bytes, MSI-X vectors, I/O events

# I/O events: an entry for each doorbell register of the function that the guest can ring by ivshmem's
EVENT_TABLE_OFFSET = 0x100
EVENT_ENTRY = struct.Struct("<IIII")  #: region, offset in it, peer, vector
EVENTS_MAX = (0x1000 - EVENT_TABLE_OFFSET) // EVENT_ENTRY.size

# Mailbox: one request at a time; the driver fills in `REQUEST`, then counts `ASKED` up and rings PEER_MAILBOX
MAILBOX_OFFSET = 0x1000
ASKED = 0  #: le32, the driver's
ANSWERED = 4  #: le32, the server's: equals ASKED when the answer is there
REQUEST = 16
REQUEST_FORMAT = struct.Struct("<IIQII")  #: operation, region, offset, count, 0
ANSWER = 48
ANSWER_FORMAT = struct.Struct("<IIQ")  #: errno, 0, value
DATA = 64
DATA_BYTES = 1024

OPERATION_READ = 1
OPERATION_WRITE = 2
OPERATION_REGION_SIZE = 3
OPERATION_RESET = 4

# Owner: a robust futex (linux/futex.h) of the driver's process; the guest's kernel marks it when that one dies
OWNER_OFFSET = 0x2000

# Memory for the function's virtqueues; DMA addresses are offsets in the shared memory
DMA_OFFSET = 0x10000
DMA_BYTES = MEMORY_BYTES - DMA_OFFSET
