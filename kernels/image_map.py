"""Reading and writing the image by copying, where its mapping is in memory: no system call, and no wait for the disk.

A page that is not in memory would be read from the disk by the page fault, and everything else of the worker would
wait for it: such a request is somebody else's. What is in memory is asked for by granules and believed for a while;
when it was not true any more, one page fault is what that costs.
"""

import numpy as np
from numba import int32, int64, uint8, uint64

from kernels.blk_disk import GRANULE_SHIFT
from kernels.jit import inlined, kernel
from kernels.memory import PAGE_BYTES, libc_mincore, libc_mmap, load_u8, load_u64, prefetch, store_u8
from kernels.status import ERR_IO, OK
from kernels.wide_copy import copy_block, copy_to_file

MARK_MAX = 255
#: Above this a system call is as fast as a copy.
COPY_MAX_BYTES = np.uint64(256 << 10)

_LOOKUPS_MAX = np.uint64(1 << 22)  # after so many the marks are made anew
_GRANULE_SHIFT = np.uint64(GRANULE_SHIFT)
_GRANULE_BYTES = np.uint64(1 << GRANULE_SHIFT)
_PAGE_BYTES = np.uint64(PAGE_BYTES)
_PAGE_MASK = np.uint64(PAGE_BYTES - 1)
_LINE_SHIFT = np.uint64(6)
_FETCH_LINES = np.uint64(4)  # the CPU's own prefetcher goes on from there
_PROT_READ = 1  # mmap(2)
_PROT_WRITE = 2
_MAP_SHARED_FIXED = np.int32(0x11)
_MAP_FAILED = np.uint64(0xFFFFFFFFFFFFFFFF)
_ZERO = np.uint64(0)
_ONE = np.uint64(1)


@kernel
def forget_marks(disk):
    """Ask anew for every granule."""
    disk.lookups = _ZERO
    disk.granule_mark += _ONE
    if disk.granule_mark > uint64(MARK_MAX):
        for k in range(disk.granules):
            store_u8(disk.granules_address + uint64(k), uint8(0))
        disk.granule_mark = _ONE


@kernel
def ask_for_granule(disk, granule, offset, end):
    """Whether bytes offset to end of the image are in memory, as far as they lie in the granule. Marks whole ones."""
    start = granule << _GRANULE_SHIFT
    length = min(_GRANULE_BYTES, disk.map_bytes - start)
    if libc_mincore(disk.map_address + start, length, disk.vector_address) != 0:
        return False
    first = max(start, offset & ~_PAGE_MASK)
    whole = True
    wanted = True
    page = start
    while page < start + length:
        if not load_u8(disk.vector_address + (page - start) // _PAGE_BYTES) & uint8(1):
            whole = False
            if first <= page < end:
                wanted = False
        page += _PAGE_BYTES
    if whole:
        store_u8(disk.granules_address + granule, uint8(disk.granule_mark))
    return wanted


@inlined
def in_memory(disk, offset, length):
    """Whether `length` bytes of the mapping (at least 1, inside it) can be touched without waiting for the disk."""
    if disk.map_always:
        return True
    disk.lookups += _ONE
    if disk.lookups > _LOOKUPS_MAX:
        forget_marks(disk)
    end = offset + length
    granule = offset >> _GRANULE_SHIFT
    while granule << _GRANULE_SHIFT < end:
        known = load_u8(disk.granules_address + granule) == uint8(disk.granule_mark)
        if not known and not ask_for_granule(disk, granule, offset, end):
            return False
        granule += _ONE
    return True


@inlined
def can_copy(disk, offset, length):
    """Whether a request of `length` bytes is done by copying; if so, its first line is on the way into the cache."""
    if disk.map_address == _ZERO or length > COPY_MAX_BYTES or offset + length > disk.map_bytes:
        return False
    prefetch(disk.map_address + offset)
    return in_memory(disk, offset, length)


@kernel
def mend_map(disk, offset, length):
    """After a SIGBUS, which put an empty page where the fault was (bus_error): map the file there again."""
    start = offset & ~_PAGE_MASK
    end = (offset + length + _PAGE_MASK) & ~_PAGE_MASK
    protection = int32(_PROT_READ | _PROT_WRITE if disk.map_writable else _PROT_READ)
    address = disk.map_address + start
    if libc_mmap(address, end - start, protection, _MAP_SHARED_FIXED, int32(disk.fd), int64(start)) == _MAP_FAILED:
        disk.map_address = _ZERO
    forget_marks(disk)


@kernel
def fetch(disk, offset, length):
    """Fetch lines of a piece of the mapping into the cache that come after the first, which can_copy asked for."""
    for line in range(1, min(_FETCH_LINES, length >> _LINE_SHIFT)):
        prefetch(disk.map_address + offset + (uint64(line) << _LINE_SHIFT))


@inlined
def copy_through_map(disk, segments, first, end, offset, length, writing, following, following_bytes):
    """Copy between the mapped image and segments[first:end]. following: what of the mapping comes next (wide_copy).

    OK; or ERR_IO when a page of the image is gone, or has no room (a hole on a full disk): a system call tells.
    """
    before = load_u64(disk.bus_errors)
    place = disk.map_address + offset
    for k in range(first, end):
        count = segments[k, 1]
        if writing:
            copy_to_file(place, segments[k, 0], count, following, following_bytes)
        else:
            copy_block(segments[k, 0], place, count, following, following_bytes)
        place += count
        following += count
        following_bytes -= min(count, following_bytes)
    if load_u64(disk.bus_errors) == before:
        return OK
    mend_map(disk, offset, length)
    return ERR_IO
