"""Codes that kernels return. Zero and above: success; below: the rule that was broken."""

OK = 0
MISS = 1  # the IOTLB lacks an address: nothing was taken, try again when it has come
LATER = 2  # the request is not done yet: somebody else does it, or has to
COPY = 3  # it is done by copying
UNDER_WAY = 4  # somebody else does it

# A driver broke the ring's structure: the vring is marked broken (virtio 1.2, 2.1.2 asks for a device reset).
ERR_AVAIL_IDX = -1  # more entries made available than the ring holds (2.7.6)
ERR_HEAD_INDEX = -2  # head of a chain outside the table (2.7.5)
ERR_NEXT_INDEX = -3  # `next` outside the table (2.7.5)
ERR_CHAIN_TOO_LONG = -4  # longer than the queue size, as a loop is (2.7.5.2)
ERR_INDIRECT_TABLE = -5  # not a multiple of 16 bytes, empty, nested, not negotiated, or not in guest memory (2.7.5.3)
ERR_DIRECTION = -6  # a device-readable descriptor after a device-writable one (2.7.4.2)
ERR_NO_STATUS = -7  # nowhere to write the request's status (5.2.6)
ERR_RING_ADDRESS = -8  # a part of the ring outside guest memory or misaligned (2.7)
ERR_MEMORY_GONE = -9  # guest memory that its front-end shared was truncated
ERR_QUEUE_SIZE = -10  # not a power of two from 1 to 32768 (2.7), or not from 1 to 32768 (2.8)
ERR_INFLIGHT = -11  # the inflight region says what cannot be
ERR_RING_BASE = -12  # a packed ring is to start at a slot that it does not have (vhost-user, SET_VRING_BASE)

# A request is at fault, not the ring: its status says so.
ERR_BAD_ADDRESS = -20  # a buffer outside guest memory
ERR_BAD_REQUEST = -21  # header too short, length not whole sectors, beyond the end, or a write to a read-only disk
ERR_IO = -22  # the host's file failed
ERR_UNSUPPORTED = -23  # a request type that this device does not have

TEXT = {
    ERR_AVAIL_IDX: "more available entries than the ring holds",
    ERR_HEAD_INDEX: "descriptor head outside the table",
    ERR_NEXT_INDEX: "next descriptor outside the table",
    ERR_CHAIN_TOO_LONG: "descriptor chain longer than the queue (a loop?)",
    ERR_INDIRECT_TABLE: "bad indirect descriptor table",
    ERR_DIRECTION: "readable descriptor after a writable one",
    ERR_NO_STATUS: "request without a place for its status",
    ERR_RING_ADDRESS: "ring outside of guest memory or misaligned",
    ERR_MEMORY_GONE: "guest memory was truncated by its owner",
    ERR_QUEUE_SIZE: "queue size is not a power of two up to 32768",
    ERR_INFLIGHT: "the inflight region is damaged",
    ERR_RING_BASE: "ring base outside of the ring",
}
