"""Run by test_stages.py in a process of its own: serve some requests and print what the stages counted."""

import json
import os
import random

from vvupipe.workers import kernel_cache

os.environ.update(kernel_cache.environment())

import numba
import numpy as np

from kernels import stage_layout as layout
from kernels import status
from kernels.blk_queue import serve_ring
from kernels.jit import kernel
from kernels.memory import cycle_counter
from kernels.stages import start_stages
from tests.kernels import disk_pair
from tests.kernels.ring_pair import RingPair
from tests.kernels.test_rings import put
from tests.mock.random_blk_driver import SplitBlkDriver

SECTORS = 256
#: as x86 and aarch64 call the counter
COUNTERS = ("rdtsc", "cntvct_el0")


@kernel
def cycles():
    """The counter, for Python."""
    return cycle_counter()


def counter_reads(function):
    """How often the machine code of a kernel that was called reads the counter, with all kernels that it calls."""
    # One from the cache has no text: compile it again, of kernels that may come from there.
    again = numba.njit(_nrt=False, nogil=True, error_model="numpy")(function.py_func)
    (signature,) = function.signatures
    again.compile(signature)
    (text,) = again.inspect_asm().values()
    assert "copy_now" in text, "callees are linked in"
    return sum(text.lower().count(name) for name in COUNTERS)


def main():
    """Print one JSON object."""
    rng = random.Random(1)
    record, scratch = np.zeros(1, layout.STAGE_RECORD), np.zeros(2, np.uint64)
    pair = RingPair(64, packed=False, event_idx=True)
    driver = SplitBlkDriver(pair.memory, pair.place, rng, pair.base, longest=6)
    driver.sectors = SECTORS
    assert pair.start() == status.OK
    disk = disk_pair.DiskPair(SECTORS, rng)
    disk.others.boards["stages"] = record.ctypes.data
    cycles()
    if layout.STAGES_ON:
        start_stages(np.uint64(record.ctypes.data), np.uint64(scratch.ctypes.data))
    began, first = int(cycles()), int(record["last"][0])
    requests = 0
    while requests < 500:
        put(driver, rng.randrange(1, 30))
        pair.sync()
        requests += disk.serve_kernel(pair)
        disk.serve_model(pair)  # which shows the driver that it may go on
        driver.reap()
    ended = int(cycles())
    print(
        json.dumps(
            {
                "requests": requests,
                "laps": dict(zip(layout.STAGES, record["laps"][0].tolist(), strict=True)),
                "cycles": int(record["cycles"].sum()),
                "between_laps": int(record["last"][0]) - first,
                "elapsed": ended - began,
                "hertz": int(record["hertz"][0]),
                "counter_reads": counter_reads(serve_ring),
            }
        )
    )


if __name__ == "__main__":
    main()
