"""Where the time of a worker goes: its stages, and the record that counts their cycles. Plain dtypes, no numba.

Kernels count only when VVUPIPE_STAGES=1 is in the environment as they are compiled; else there is no trace of it.
"""

import os

import numpy as np

STAGES_ENV = "VVUPIPE_STAGES"
STAGES_ON = os.environ.get(STAGES_ENV) == "1"

#: In the order in which a request meets them; the last two are of a worker that has nothing to do.
STAGES = (
    "commands",
    "find",
    "look ahead",
    "parse",
    "take",
    "keep",
    "do",
    "hand on",
    "copy",
    "collect",
    "answer",
    "publish",
    "call",
    "spin",
    "sleep",
)
COMMANDS, FIND, AHEAD, PARSE, TAKE, KEEP, DO, HAND_ON, COPY, COLLECT, ANSWER, PUBLISH, CALL, SPIN, SLEEP = range(15)
assert STAGES[SLEEP] == "sleep"

#: One for each worker, which is its only writer; 128-byte aligned. The cycles of all stages are all the time there was.
STAGE_RECORD = np.dtype(
    [
        ("cycles", "<u8", (15,)),  # by stage
        ("laps", "<u8", (15,)),  # how often a stage ended; of `take`: requests
        ("last", "<u8"),  # the cycle counter when the last one ended
        ("hertz", "<u8"),  # cycles a second
    ]
)
assert STAGE_RECORD.itemsize == 256
assert STAGE_RECORD["cycles"].shape == (len(STAGES),)
