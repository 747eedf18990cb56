"""Counting the cycles of each stage of a worker, when that is wanted (kernels.stage_layout); else it is no code at all.

One counter is read where one stage ends and the next begins, so that nothing falls between two of them.
"""

import numpy as np
from numba import int64, uint64

from kernels.jit import inlined, kernel
from kernels.memory import cycle_counter, load_u64, monotonic_ns, store_u64
from kernels.stage_layout import STAGE_RECORD, STAGES_ON

_LAPS = np.uint64(STAGE_RECORD.fields["laps"][1])
_LAST = np.uint64(STAGE_RECORD.fields["last"][1])
_HERTZ = np.uint64(STAGE_RECORD.fields["hertz"][1])
_EIGHT = np.uint64(8)
_CALIBRATION_NS = 20_000_000


@inlined
def lap_many(board, stage, count):
    """The stage `stage` (stage_layout) of so many requests ends here, and another begins.

    board: request_record.BOARD, for its `stages`.
    """
    if STAGES_ON:
        now = cycle_counter()
        record = board.stages
        cycles = record + _EIGHT * uint64(stage)
        laps = cycles + _LAPS
        store_u64(cycles, load_u64(cycles) + now - load_u64(record + _LAST))
        store_u64(laps, load_u64(laps) + uint64(count))
        store_u64(record + _LAST, now)


@inlined
def lap(board, stage):
    """The same, of one or of however many: it counts as one."""
    lap_many(board, stage, int64(1))


@kernel
def start_stages(record, scratch):
    """Find out how fast the cycle counter is, which takes 20 ms; the first stage begins.

    record: address of a STAGE_RECORD. scratch: address of 16 bytes of this process.
    """
    began_ns = monotonic_ns(scratch)
    began = cycle_counter()
    passed = int64(0)
    while passed < _CALIBRATION_NS:
        passed = monotonic_ns(scratch) - began_ns
    now = cycle_counter()
    store_u64(record + _HERTZ, uint64(float(now - began) * 1e9 / passed))
    store_u64(record + _LAST, now)
