"""Serving several requests together: reads and writes whose chains are of the usual shape (usual_chain).

First all their descriptors are read, then all their headers, then come all the copies, then all the answers: so that
the cache misses of one step overlap. work: blk_work.BlockWork, in every kernel here.
"""

import numpy as np
from numba import int64, uint64

from kernels import stage_layout as stage
from kernels.blk_answer import answer
from kernels.blk_helper import perform
from kernels.blk_here import do_here
from kernels.blk_later import do_later, keep, nobody_else
from kernels.image_map import copy_through_map, fetch
from kernels.jit import inlined, kernel
from kernels.memory import load_u32, load_u64
from kernels.stages import lap, lap_many
from kernels.status import COPY, LATER, OK, UNDER_WAY
from kernels.usual_chain import look_at_usual, take_usual
from kernels.virtio_layout import BLK_HEADER_SIZE, BLK_T_IN, BLK_T_OUT, SECTOR_SHIFT
from kernels.vring import hold

#: Copies of a group end with the one that reaches this: then those that were copied have waited long enough.
GROUP_BYTES = np.uint64(512 << 10)

_ZERO = np.uint64(0)
_ONE = np.uint64(1)
_HEADER_BYTES = np.uint64(BLK_HEADER_SIZE)


@inlined
def parse_group(work, count):
    """Read the headers (virtio 1.2, 5.2.6) of work.chains[:count]. Returns how many, from the first, read or write."""
    for k in range(count):
        chain = work.chains[k]
        kind = int64(load_u32(chain.first))
        if kind != (BLK_T_IN if chain.data_writable else BLK_T_OUT):
            return k
        chain.kind = kind
        chain.sector = load_u64(chain.first + uint64(8))
    return count


@inlined
def start_group(work, ring, count):
    """Do those of work.chains[:count] that take neither copying nor waiting; `status` tells what is left to be done.

    Returns how many of them the group has, from the first. segments[k] becomes the data of the k-th.
    """
    # With nobody to hand it to, or none to pass it, one that waits has the ring for itself.
    waits_alone = ring.in_order or nobody_else(work)
    copied = _ZERO
    for k in range(count):
        chain = work.chains[k]
        work.segments[k, 0] = chain.data
        work.segments[k, 1] = chain.data_bytes
        chain.status = do_here(
            work.disk, work.segments, chain.kind, chain.sector, k, k + 1, chain.data_bytes, ring.write_through
        )
        if chain.status == COPY and count > 1:
            fetch(work.disk, chain.sector << uint64(SECTOR_SHIFT), chain.data_bytes)
            copied += chain.data_bytes
        if chain.status == LATER and waits_alone:
            return max(k, 1)
        if copied >= GROUP_BYTES:
            return k + 1
    return count


@inlined
def have_done(work, ring, chain, row):
    """Have somebody else do the request of a chain that was taken; its data is segments[row]."""
    slot = keep(
        work, ring, chain.head, chain.kind, chain.sector, chain.data_bytes, row, row + 1, chain.last, int64(0), int64(0)
    )
    lap(work.board, stage.KEEP)
    chain.status = UNDER_WAY
    do_later(work, ring, slot)
    lap(work.board, stage.HAND_ON)


@inlined
def take_group(work, ring, count):
    """Take work.chains[:count]; those that somebody else can do are his. Returns (how many were taken, OK or ERR_*)."""
    others = not nobody_else(work)
    for k in range(count):
        chain = work.chains[k]
        status = take_usual(ring, chain, work.copied)
        if status != OK:
            return k, int64(status)
        if chain.status == LATER and others:
            have_done(work, ring, chain, k)
    return count, int64(OK)


@inlined
def copy_group(work, count):
    """Do those of work.chains[:count] that are done by copying."""
    for k in range(count):
        chain = work.chains[k]
        if chain.status != COPY:
            continue
        if work.disk.map_address == _ZERO:  # lost since
            chain.status = LATER
            continue
        following = following_bytes = _ZERO
        if k + 1 < count and work.chains[k + 1].status == COPY:
            following = work.disk.map_address + (work.chains[k + 1].sector << uint64(SECTOR_SHIFT))
            following_bytes = work.chains[k + 1].data_bytes
        offset = chain.sector << uint64(SECTOR_SHIFT)
        status = copy_through_map(
            work.disk,
            work.segments,
            k,
            k + 1,
            offset,
            chain.data_bytes,
            chain.kind == BLK_T_OUT,
            following,
            following_bytes,
        )
        chain.status = OK if status == OK else LATER


@inlined
def answer_group(work, ring, count):
    """Answer those of work.chains[:count] that are done; do, or have done, what could not be copied after all."""
    for k in range(count):
        chain = work.chains[k]
        if chain.status == UNDER_WAY:
            continue
        hold(ring, chain)
        status = chain.status
        if status == LATER:
            if not ring.in_order and not nobody_else(work):
                have_done(work, ring, chain, k)
                continue
            status = perform(
                work.disk, work.segments, work.scratch, chain.kind, chain.sector, k, k + 1, ring.write_through
            )
        answer(work, ring, chain.head, chain.kind, chain.data_bytes, chain.last, int64(0), int64(0), int64(status))


@kernel
def serve_group(work, ring, most):
    """Serve the next chains, at most `most`, as far as they are reads and writes of the usual shape.

    As many can be under way, and are available if the ring is split. Nothing is logged, and none is to be done again.
    Returns (how many were taken, OK or ERR_*).
    """
    count = look_at_usual(ring, work.regions, work.copied, work.chains, most, _HEADER_BYTES, _ONE)
    lap(work.board, stage.AHEAD)
    count = parse_group(work, count)
    lap(work.board, stage.PARSE)
    if count == 0:
        return count, int64(OK)
    if count == 1:
        ring.header = work.chains[0].first
    count = start_group(work, ring, count)
    lap(work.board, stage.DO)
    count, error = take_group(work, ring, count)
    lap_many(work.board, stage.TAKE, count)
    copy_group(work, count)
    lap(work.board, stage.COPY)
    answer_group(work, ring, count)
    lap(work.board, stage.ANSWER)
    return count, error
