"""The kernel of memcpy_limit."""

import numpy as np
from numba import uint64

from kernels.driver_random import multiply_high, next_random
from kernels.jit import kernel
from kernels.memory import LINE_BYTES, copy_bytes, load_u64, prefetch, prefetch_early
from kernels.wide_copy import TWO_PLACES_BYTES, copy_block, copy_to_file

WALK = np.dtype(
    [
        ("random", "<u8"),  # state of kernels.driver_random
        ("cursor", "<u8"),  # next block when sequential
        ("blocks", "<u8"),
        ("block_bytes", "<u8"),
        ("image", "<u8"),  # address
        ("memory", "<u8"),  # address of the buffers
        ("buffers", "<u8"),
        ("ahead", "<u8"),
        ("is_random", "<i8"),
        ("writing", "<i8"),  # 1: from the buffers to the image
        ("sum", "<u8"),  # of what read_blocks looked at
    ]
)
_LINES = 4
_EARLY_BYTES = 4096  # how far ahead of what it reads read_blocks fetches


@kernel
def choose_block(walk):
    """Address of the next block that the workload wants."""
    if walk.is_random:
        block = multiply_high(next_random(walk), walk.blocks)
    else:
        block = walk.cursor
        walk.cursor = block + uint64(1) if block + uint64(1) < walk.blocks else uint64(0)
    return walk.image + block * walk.block_bytes


@kernel
def fetch_beginning(block):
    """The first lines of a block: the CPU's own prefetcher has something to go by."""
    for line in range(_LINES):
        prefetch(block + uint64(line * LINE_BYTES))


@kernel
def copy_blocks(walk, offsets, count):
    """Copy at least `count` blocks; the number that was copied. walk: WALK. offsets: uint64[ahead or more].

    One after the other by libc's memcpy; with `ahead` > 1, that many are copied as vvupipe's workers do it.
    """
    done = 0
    buffer = uint64(0)
    while done < count:
        for k in range(walk.ahead):
            offsets[k] = choose_block(walk)
            if walk.ahead > uint64(1):
                fetch_beginning(offsets[k])
        for k in range(walk.ahead):
            place = walk.memory + buffer * walk.block_bytes
            to, source = (offsets[k], place) if walk.writing else (place, offsets[k])
            following_bytes = walk.block_bytes if uint64(k) + uint64(1) < walk.ahead else uint64(0)
            following = offsets[k + 1] if following_bytes else uint64(0)
            if walk.ahead <= uint64(1):
                copy_bytes(to, source, walk.block_bytes)
            elif walk.writing:
                copy_to_file(to, source, walk.block_bytes, following, following_bytes)
            else:
                copy_block(to, source, walk.block_bytes, following, following_bytes)
            buffer = buffer + uint64(1) if buffer + uint64(1) < walk.buffers else uint64(0)
        done += walk.ahead
    return done


@kernel
def read_blocks(walk, count):
    """Look at a word of each line of `count` blocks. walk: WALK.

    No way to read blocks is much faster, whatever it does with them: nothing is stored, and the next two are fetched
    meanwhile.
    """
    total = walk.sum
    large = walk.block_bytes >= TWO_PLACES_BYTES
    places = uint64(2) if large else uint64(1)
    part = (walk.block_bytes // places) & ~uint64(LINE_BYTES - 1)
    lead = min(part, uint64(_EARLY_BYTES))
    source, following = choose_block(walk), choose_block(walk)
    for _ in range(count):
        after = choose_block(walk)
        fetch_beginning(after)
        at = uint64(0)
        while at < part:
            early = at + lead
            early = source + early if early < part else following + early - part
            prefetch_early(early)
            total += load_u64(source + at)
            if large:
                prefetch_early(early + part)
                total += load_u64(source + part + at)
            at += uint64(LINE_BYTES)
        source, following = following, after
    walk.sum = total
    return count
