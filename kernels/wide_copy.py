"""Copying a block faster than memcpy does: a line at a time, from two places at once when the block is large.

libc's memcpy, measured on blocks that are not in the cache, waits longer: its `rep movsb` overlaps less with what was
done before, and a large block it reads from one place only, so that fewer misses are under way.
"""

import numpy as np

from kernels.jit import inlined, kernel
from kernels.memory import LINE_BYTES, LINES_ARE_WIDE, copy_bytes, copy_line, prefetch_early

#: From this size on both halves are copied at once.
TWO_PLACES_BYTES = np.uint64(16 << 10)

#: How far ahead of a large copy its lines are fetched: the CPU's own prefetcher does not cross a page.
_AHEAD = np.uint64(4 << 10)
_LINE = np.uint64(LINE_BYTES)
_LINE_MASK = np.uint64(LINE_BYTES - 1)
_ZERO = np.uint64(0)
_ONE = np.uint64(1)


@kernel
def copy_halves(destination, source, half, following, following_half):
    """Copy twice `half` bytes, a number of lines and at least _AHEAD.

    following: address of twice `following_half` bytes that are copied next; 0: it is not known.
    """
    done = _ZERO
    while done < half - _AHEAD:
        prefetch_early(source + done + _AHEAD)
        prefetch_early(source + half + done + _AHEAD)
        copy_line(destination + done, source + done)
        copy_line(destination + half + done, source + half + done)
        done += _LINE
    while done < half:
        if following_half:
            prefetch_early(following)
            prefetch_early(following + following_half)
            following += _LINE
        copy_line(destination + done, source + done)
        copy_line(destination + half + done, source + half + done)
        done += _LINE


@inlined
def copy_block(destination, source, count, following, following_bytes):
    """memcpy: `count` bytes; the two must not overlap.

    following: address of `following_bytes` that are copied next, fetched meanwhile: so the CPU waits for misses of two
    blocks at once, and its own prefetcher need not find out about the next one.
    """
    if not LINES_ARE_WIDE:
        copy_bytes(destination, source, count)
        return
    done = _ZERO
    if count >= TWO_PLACES_BYTES:
        half = (count >> _ONE) & ~_LINE_MASK
        copy_halves(destination, source, half, following, (following_bytes >> _ONE) & ~_LINE_MASK)
        done = half << _ONE
    lines_end = count & ~_LINE_MASK
    both_end = min(lines_end, following_bytes)
    while done < both_end:
        prefetch_early(following + done)
        copy_line(destination + done, source + done)
        done += _LINE
    while done < lines_end:
        copy_line(destination + done, source + done)
        done += _LINE
    if count & _LINE_MASK:
        copy_bytes(destination + done, source + done, count & _LINE_MASK)


@inlined
def copy_to_file(destination, source, count, following, following_bytes):
    """copy_block into a mapped file, which is seldom in the cache: `rep movsb` need not read a large place first."""
    if count >= TWO_PLACES_BYTES:
        copy_bytes(destination, source, count)
    else:
        copy_block(destination, source, count, following, following_bytes)
