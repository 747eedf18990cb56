"""Run by test_stages.py in a process of its own: count some stages and print what came of it."""

import json
import os

from vvupipe.workers import kernel_cache

os.environ.update(kernel_cache.environment())

import numba
import numpy as np

from kernels import stage_layout as layout
from kernels.jit import OPTIONS
from kernels.request_record import BOARD
from kernels.stages import lap, start_stages

#: as x86 and aarch64 call the counter
COUNTERS = ("rdtsc", "cntvct_el0")


@numba.njit(_nrt=False, **OPTIONS)  # not from the cache, whose kernels have no text
def some_laps(board):
    """Three stages end."""
    lap(board, layout.FIND)
    lap(board, layout.PARSE)
    lap(board, layout.PARSE)


def main():
    """Print one JSON object."""
    record, scratch = np.zeros(1, layout.STAGE_RECORD), np.zeros(2, np.uint64)
    board = np.zeros(1, BOARD)
    board["stages"] = record.ctypes.data
    start_stages(np.uint64(record.ctypes.data), np.uint64(scratch.ctypes.data))
    first = int(record["last"][0])
    some_laps(board[0])
    (text,) = some_laps.inspect_asm().values()
    print(
        json.dumps(
            {
                "laps": dict(zip(layout.STAGES, record["laps"][0].tolist(), strict=True)),
                "cycles": dict(zip(layout.STAGES, record["cycles"][0].tolist(), strict=True)),
                "between_laps": int(record["last"][0]) - first,
                "hertz": int(record["hertz"][0]),
                "counter_reads": sum(text.lower().count(name) for name in COUNTERS),
            }
        )
    )


if __name__ == "__main__":
    main()
