"""The limit of the machine: the copies of a workload alone, between a mapped image and a few buffers in RAM.

Nothing but the copies is done: no ring, no second CPU, the random numbers of the workload. `one` copies block after
block; `ahead` fetches the first lines of 16 blocks into the cache before it copies them, which is what
kernels/blk_group.py does and the harder limit. `reading` does not even copy: it looks at every line of the
image's blocks, which is all the bandwidth that one CPU has.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ONE, AHEAD, READING = "one", "ahead", "reading"
WAYS = (ONE, AHEAD, READING)
_AHEAD_BLOCKS = 16
_BATCH = 4096
_WARM_UP_S = 0.2


def measure(
    image: Path, workload: str, block_bytes: int, depth: int, seconds: float, cpu: int, way: str
) -> dict[str, float]:
    """iops (copies a second) and cpu_us_per_request of a process that only copies, on `cpu`.

    workload: randread, randwrite, read or write. way: one of WAYS; READING is for reads.
    """
    from vvupipe.workers import kernel_cache

    command = [
        *(sys.executable, "-m", "perf.memcpy_limit", str(image), workload, way),
        *(str(block_bytes), str(depth), str(seconds), str(cpu)),
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=kernel_cache.environment(), stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _main(arguments: list[str]) -> int:
    import numpy as np

    from kernels.memory import monotonic_ns
    from perf.memcpy_kernel import WALK, copy_blocks, read_blocks

    parser = argparse.ArgumentParser()
    parser.add_argument("image", type=Path)
    parser.add_argument("workload")
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("numbers", type=float, nargs=4)
    options = parser.parse_args(arguments)
    block_bytes, depth, seconds, cpu = options.numbers
    os.sched_setaffinity(0, [int(cpu)])
    with options.image.open("r+b") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        mapping = mmap.mmap(file.fileno(), size_bytes, flags=mmap.MAP_SHARED)
    image: Any = np.frombuffer(mapping, np.uint8)
    buffers = np.ones(int(depth * block_bytes) + mmap.PAGESIZE, np.uint8)
    scratch = np.zeros(2, np.uint64)
    offsets = np.zeros(_AHEAD_BLOCKS, np.uint64)
    walk = np.zeros(1, WALK)[0]
    walk["random"], walk["blocks"] = 0x9E3779B97F4A7C15, size_bytes // int(block_bytes)
    walk["block_bytes"], walk["buffers"] = block_bytes, depth
    walk["ahead"] = 1 if options.way == ONE else _AHEAD_BLOCKS
    walk["image"] = image.ctypes.data
    walk["memory"] = buffers.ctypes.data + -buffers.ctypes.data % mmap.PAGESIZE
    walk["is_random"], walk["writing"] = options.workload.startswith("rand"), options.workload.endswith("write")
    scratch_address = np.uint64(scratch.ctypes.data)
    copies, began, used = 0, monotonic_ns(scratch_address), time.process_time()
    for span in (_WARM_UP_S, seconds):
        copies, began, used = 0, monotonic_ns(scratch_address), time.process_time()
        while monotonic_ns(scratch_address) - began < span * 1e9:
            if options.way == READING:
                copies += read_blocks(walk, _BATCH)
            else:
                copies += copy_blocks(walk, offsets, _BATCH)
    elapsed_ns = monotonic_ns(scratch_address) - began
    used_us = (time.process_time() - used) * 1e6
    print(json.dumps({"iops": copies * 1e9 / elapsed_ns, "cpu_us_per_request": used_us / copies}))
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
