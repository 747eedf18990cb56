"""A device without a disk: it fills what is writable with a pattern. Once for the kernels, once for the model.

Both count the points between two things that a device does to a ring, and can end at any of them, as if killed.
"""

import numpy as np
from numba import int64, uint8, uint64

from kernels.dirty_log import mark_segments
from kernels.jit import kernel
from kernels.memory import store_u8
from kernels.status import OK
from kernels.vring import call_if_wanted, give_back, look_at_next, publish, take, waiting
from tests.model.guest_memory import Broken, Missing

FILL_MAX = 24  # bytes of each segment
_PATTERN = [bytes((start + j * 7) & 255 for j in range(FILL_MAX)) for start in range(256)]
CHAIN_COLUMNS = 4  # head, readable segments, all segments, whether it is clean
KILLED = 2


@kernel
def fill(segments, first, end, token):
    """Returns the bytes written."""
    written = uint64(0)
    for k in range(first, end):
        count = min(segments[k, 1], uint64(FILL_MAX))
        for j in range(int64(count)):
            store_u8(segments[k, 0] + uint64(j), uint8((token + j * 7 + k) & 255))
        written += count
    return written


@kernel
def echo(ring, regions, memory, segments, copied, one, limit, group, ends_at, chains, seen):
    """Serve up to `limit` chains, shown to the driver by `group`. Returns (chains looked at, status, segments seen).

    chains: int64[limit + 1, 4]. seen: uint64[n, 2], every segment, one chain after the other. ends_at: the point to be
    killed at, -1 for none.
    """
    looked = 0
    done = 0
    rows = 0
    point = 0
    status = int64(OK)
    while done < limit:
        available = waiting(ring)
        if available <= 0:
            status = available
            break
        status, head, readable, count, clean = look_at_next(ring, regions, segments, copied)
        if status != OK:
            break
        chains[looked, 0] = head
        chains[looked, 1] = readable
        chains[looked, 2] = count
        chains[looked, 3] = clean
        for k in range(count):
            seen[rows, 0] = segments[k, 0]
            seen[rows, 1] = segments[k, 1]
            rows += 1
        looked += 1
        if point == ends_at:
            return looked, int64(KILLED), rows
        status = int64(take(ring, head, copied, int64(0)))
        if status != OK:
            break
        if point + 1 == ends_at:
            return looked, int64(KILLED), rows
        written = fill(segments, readable, count, done) if clean else uint64(0)
        if ring.log_bytes:
            mark_segments(ring, memory, segments, readable, count)
        if point + 2 == ends_at:
            return looked, int64(KILLED), rows
        give_back(ring, memory, head, written)
        done += 1
        if point + 3 == ends_at:
            return looked, int64(KILLED), rows
        if done % group == 0:
            publish(ring, one)
            if point + 4 == ends_at:
                return looked, int64(KILLED), rows
            call_if_wanted(ring, one)
        point += 5
    publish(ring, one)
    if status == OK:
        call_if_wanted(ring, one)
    return looked, status, rows


def model_fill(memory, segments, readable, token):
    written = 0
    for k, (piece, offset, length) in enumerate(segments[readable:], readable):
        count = min(length, FILL_MAX)
        memory.pieces[piece][offset : offset + count] = _PATTERN[(token + k) & 255][:count]
        written += count
    return written


def model_echo(ring, limit, group, ends_at):
    """The same on a model's ring: ([(chain)], the name of a broken rule, a Missing, KILLED or None)."""
    chains = []
    done = point = 0
    outcome = None
    memory = ring.memory
    try:
        while done < limit and ring.available():
            chain = ring.look()
            chains.append(chain)
            if point == ends_at:
                return chains, KILLED
            ring.take(chain)
            if point + 1 == ends_at:
                return chains, KILLED
            segments, readable = chain.buffers.segments, chain.buffers.readable
            written = model_fill(memory, segments, readable, done) if chain.buffers.clean else 0
            for segment in segments[readable:]:
                memory.mark(*segment)
            if point + 2 == ends_at:
                return chains, KILLED
            ring.give_back(chain, written)
            done += 1
            if point + 3 == ends_at:
                return chains, KILLED
            if done % group == 0:
                ring.publish()
                if point + 4 == ends_at:
                    return chains, KILLED
                ring.call_if_wanted()
            point += 5
    except Broken as rule:
        outcome = rule.args[0]
    except Missing as missing:
        outcome = missing
    ring.publish()
    if outcome is None:
        ring.call_if_wanted()
    return chains, outcome


def chain_buffers(limit, rows):
    """(chains, seen) for `echo`."""
    return np.zeros((limit + 1, CHAIN_COLUMNS), np.int64), np.zeros((rows, 2), np.uint64)
