"""What a vCPU of the embedded sibling keeps about its vring, its requests and its job. Plain dtypes, no numba.

VCPU, DIRECTION and the histograms lie in memory shared with the parent, one area per vCPU; "P" marks what the parent
writes, everything else is the vCPU's. The other records are private to the vCPU process. `_gpa` is guest-physical,
other addresses are the process's own.
"""

import numpy as np

# What a kernel returns: zero and above it can go on or has ended well, below the rule that the device broke.
DONE = 0
COMMAND = 1  # a command of the parent is waiting
ERR_USED_IDX = -40  # used.idx moved past what is in flight (virtio 1.2, 2.7.8)
ERR_USED_ID = -41  # a used element for a descriptor that heads no request in flight (2.7.8)
ERR_USED_LEN = -42  # more bytes written than the request has room for (2.7.8)
ERR_FILE = -43  # the host's file failed, see VCPU.file_errno; 0: it ended too early

TEXT = {
    ERR_USED_IDX: "it used more requests than are in flight",
    ERR_USED_ID: "it used a request that is not in flight",
    ERR_USED_LEN: "it says that it wrote more than the request has room for",
}

# Log-linear histogram: 32 steps for each power of two, so a bucket is at most 1/32 wide; up to 2^43 ns (146 minutes).
SUB_BITS = 5
BUCKETS = ((42 - SUB_BITS) << SUB_BITS) + (2 << SUB_BITS)

#: The parent's view of one vCPU.
VCPU = np.dtype(
    [
        ("attention", "<u4"),  # P: differs from what the vCPU last saw when a command waits
        ("_pad0", "<u4", (15,)),
        ("finished_jobs", "<u8"),  # jobs that ended; `status` belongs to the last one
        ("status", "<i8"),  # DONE or ERR_*
        ("file_errno", "<i8"),
        ("done_bytes", "<u8"),  # transfer: bytes that are through
        ("in_flight", "<i8"),
        ("started_ns", "<i8"),  # CLOCK_MONOTONIC of the job's first and last request
        ("ended_ns", "<i8"),
        ("flushes", "<u8"),
        ("errors", "<u8"),  # requests with another status than OK
        ("first_error_sector", "<u8"),
        ("first_error_kind", "<u8"),
        ("first_error_status", "<u8"),
        ("verified_blocks", "<u8"),
        ("mismatches", "<u8"),  # blocks that held something else
        ("first_mismatch_bytes", "<u8"),  # offset on the disk
        ("passes", "<u8"),
        ("kicks", "<u8"),
        ("calls", "<u8"),
        ("sleeps", "<u8"),
        ("_pad1", "<u8", (5,)),
    ]
)
assert VCPU.itemsize == 256

READ = 0
WRITE = 1
#: One for reads, one for writes.
DIRECTION = np.dtype(
    [
        ("requests", "<u8"),
        ("bytes", "<u8"),
        ("latency_sum_ns", "<u8"),
        ("latency_min_ns", "<u8"),
        ("latency_max_ns", "<u8"),
    ]
)

DIRECTIONS_OFF = VCPU.itemsize
HISTOGRAMS_OFF = DIRECTIONS_OFF + 2 * DIRECTION.itemsize + 48
assert HISTOGRAMS_OFF % 64 == 0
VCPU_AREA_BYTES = -(-(HISTOGRAMS_OFF + 2 * BUCKETS * 8) // 4096) * 4096

#: The driver's side of a split vring.
DRIVER_RING = np.dtype(
    [
        ("ram", "<u8"),  # where guest-physical 0 is
        ("desc", "<u8"),
        ("avail", "<u8"),
        ("used", "<u8"),
        ("one", "<u8"),  # address of a 64-bit 1
        ("scratch", "<u8"),  # 8 bytes to drain an eventfd into
        ("size", "<i8"),
        ("event_idx", "<i8"),
        ("indirect", "<i8"),
        ("in_flight", "<i8"),
        ("latest", "<u8"),  # address of the place of the request that was put last
        ("kicks", "<u8"),
        ("calls", "<u8"),
        ("kick_fd", "<i4"),
        ("call_fd", "<i4"),
        ("avail_idx", "<u2"),  # next available entry to write
        ("published_idx", "<u2"),  # avail.idx as the device sees it
        ("last_used_idx", "<u2"),  # next used entry to take
        ("_pad", "<u2"),
    ],
    align=True,
)

# A request's place in guest memory: header and status on one cache line, which goes to the device and comes back; the
# descriptors on the next, which both sides only read as long as the direction stays.
TAG_BYTES = 128
TAG_STATUS_OFF = 16
TAG_TABLE_OFF = 64
DESCS_PER_REQUEST = 3  # header, data, status (virtio 1.2, 5.2.6)
STATUS_UNSET = 0xFF  # no status of the specification, so a device that writes none is noticed

#: A request that can be in flight.
TAG = np.dtype(
    [
        ("place", "<u8"),  # its TAG_BYTES
        ("table", "<u8"),  # its three descriptors: in the ring's table, or indirect
        ("data", "<u8"),
        ("sector", "<u8"),
        ("block", "<u8"),  # verify: number of the block; transfer: number of the chunk
        ("start_ns", "<i8"),
        ("length", "<u8"),  # of the data, in bytes
        ("kind", "<u4"),  # BLK_T_*
        ("shape", "<u4"),  # kind + 1 for which `table` is filled in; 0: for none
        ("in_flight", "<u4"),
        ("first", "<u2"),  # index of its first descriptor in the table that `next` counts in
        ("head", "<u2"),  # index of what is made available
    ],
    align=True,
)

RANDOM = 0
SEQUENTIAL = 1

PHASE_WRITE = 0
PHASE_FLUSH = 1
PHASE_READ = 2

#: What the vCPU is doing; one record for all kinds of job, so that it can be left and entered again at any time.
JOB = np.dtype(
    [
        ("depth", "<i8"),  # tags to use
        ("stopping", "<i8"),  # 1: start no more requests
        ("runtime_ns", "<i8"),  # 0: until `limit`
        ("deadline_ns", "<i8"),
        ("limit", "<u8"),  # requests to start; 0: until the runtime is over
        ("issued", "<u8"),
        ("order", "<i8"),  # RANDOM, SEQUENTIAL
        ("read_share", "<u8"),  # reads when a random 64-bit number is below it
        ("only", "<i8"),  # BLK_T_IN or BLK_T_OUT for every request, -1: mixed by read_share
        ("first_sector", "<u8"),
        ("blocks", "<u8"),  # blocks from first_sector on
        ("block_bytes", "<u8"),
        ("block_sectors", "<u8"),
        ("cursor", "<u8"),
        ("random", "<u8"),  # state of the generator
        # verify
        ("seed", "<u8"),
        ("generation", "<u8"),
        ("phase", "<i8"),
        ("can_flush", "<i8"),
        ("written", "<u8"),  # blocks written in this pass
        ("order_x", "<u8"),  # the permutation, see driver_random
        ("order_mask", "<u8"),
        ("order_multiplier", "<u8"),
        ("order_increment", "<u8"),
        ("order_shift", "<u8"),
        # transfer
        ("kind", "<i8"),  # BLK_T_*
        ("file_fd", "<i8"),  # -1: none
        ("file_offset", "<i8"),
        ("file_failed", "<i8"),
        ("window", "<u8"),  # address of the first chunk's data
        ("total_bytes", "<u8"),
        ("chunk_bytes", "<u8"),
        ("chunks", "<u8"),
    ],
    align=True,
)

#: What waiting needs.
WAIT = np.dtype(
    [
        ("record", "<u8"),  # address of the VCPU record
        ("scratch", "<u8"),
        ("spin_max_ns", "<i8"),  # longest time to spin before sleeping; 0 never spins
        ("spin_ns", "<i8"),  # the present one, adapted to what happened
        ("idle_since_ns", "<i8"),
        ("spins", "<i8"),
        ("polite", "<i8"),
        ("sleeps", "<u8"),
        ("attention_seen", "<u4"),
        ("_pad", "<u4"),
    ],
    align=True,
)
