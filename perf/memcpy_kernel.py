"""The kernel of memcpy_limit."""

import numpy as np
from numba import uint64

from kernels.driver_random import multiply_high, next_random
from kernels.jit import kernel
from kernels.memory import copy_bytes, prefetch
from kernels.wide_copy import copy_block, copy_to_file

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
    ]
)
_LINES = 4
_LINE_BYTES = 64


@kernel
def copy_blocks(walk, offsets, count):
    """Copy at least `count` blocks; the number that was copied. walk: WALK. offsets: uint64[ahead or more].

    One after the other by libc's memcpy; with `ahead` > 1, that many are copied as vvupipe's workers do it.
    """
    done = 0
    buffer = uint64(0)
    while done < count:
        for k in range(walk.ahead):
            if walk.is_random:
                block = multiply_high(next_random(walk), walk.blocks)
            else:
                block = walk.cursor
                walk.cursor = block + uint64(1) if block + uint64(1) < walk.blocks else uint64(0)
            offsets[k] = walk.image + block * walk.block_bytes
            if walk.ahead > uint64(1):
                for line in range(_LINES):
                    prefetch(offsets[k] + uint64(line * _LINE_BYTES))
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
