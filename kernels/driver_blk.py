"""What every job does with a finished virtio-blk request: its status, its counters."""

from numba import uint64

from kernels.driver_ring import publish, status_of
from kernels.jit import kernel
from kernels.virtio_layout import BLK_S_OK

#: Requests put before the device is shown them: it starts on the first while we prepare the rest.
PUBLISH_EVERY = 8


@kernel
def check_status(tag, record):
    """True when the device did the request; else it is counted, the first one with its place."""
    status = status_of(tag)
    if status == BLK_S_OK:
        return True
    if record.errors == uint64(0):
        record.first_error_sector = tag.sector
        record.first_error_kind = uint64(tag.kind)
        record.first_error_status = uint64(status)
    record.errors += uint64(1)
    return False


@kernel
def show(ring, wait, record):
    """Publish to the device, and the counters to the parent."""
    publish(ring)
    record.in_flight = ring.in_flight
    record.kicks = ring.kicks
    record.calls = ring.calls
    record.sleeps = wait.sleeps
