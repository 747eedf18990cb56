"""A request under way as its worker keeps it, and who has which slot. Plain, no numba."""

import numpy as np

from kernels.blk_disk import SEGMENTS_EACH

#: Room for the longest chain, each descriptor of which may lie across a border between two regions.
SEGMENTS_MAX = 2 * 32768
#: Requests of one worker that can be under way; one vring has at most half of them.
REQUESTS_MAX = 512
#: Rows of a segment list with room for the chain in hand twice, and for every request under way twice: the second
#: copy stays whole and tells the dirty-page log what was written.
SEGMENT_ROWS = 2 * SEGMENTS_MAX + REQUESTS_MAX * 2 * SEGMENTS_EACH
NOBODY = -1

REQUEST = np.dtype(
    [
        ("ring", "<i8"),  # index of its ring
        ("head", "<i8"),  # its chain: head, and what a packed ring knows of it (RING's fields of these names)
        ("slots", "<i8"),
        ("buffer_id", "<i8"),
        ("entry", "<i8"),
        ("status_address", "<u8"),  # where the driver wants the status
        ("kind", "<i8"),  # BLK_T_*
        ("sector", "<u8"),
        ("length", "<u8"),  # bytes of data
        ("end", "<i8"),  # its data: rows room_of(slot) to here of the segment list
        ("logged_end", "<i8"),  # room_of(slot) + SEGMENTS_EACH to here: everything it writes, for the dirty-page log
        ("write_through", "<i8"),
        ("next", "<i8"),  # in the list of free slots, or of those that wait for a helper; -1 ends it
        ("merged", "<i8"),  # the next of those that are done together with it; -1: no more
        ("last_merged", "<i8"),
        ("whole_end", "<i8"),  # end and length with those merged into it
        ("whole_length", "<u8"),
        ("bounced", "<i8"),  # 1: io_uring reads or writes its slot's bounce room in place of guest memory
        ("status", "<i8"),  # OK or ERR_*, when a helper has done it
    ],
    align=True,
)

#: Who has which slot; one record, private to the process.
BOARD = np.dtype(
    [
        ("free", "<i8"),  # first free slot
        ("under_way", "<i8"),
        ("open", "<i8"),  # a read or write that the next one may be merged into; not handed on yet
        ("first_waiting", "<i8"),  # for a helper
        ("last_waiting", "<i8"),
        ("free_helpers", "<i8"),
        ("merges", "<u8"),  # requests that went along with another
        ("redone", "<u8"),  # requests that io_uring did not do, or not wholly, and a helper did again
        ("stages", "<u8"),  # address of the worker's stage_layout.STAGE_RECORD; 0 when stages are not counted
    ],
    align=True,
)


def lay_out(board: np.ndarray, requests: np.ndarray) -> None:
    """Make every slot free. board: BOARD[1], requests: REQUEST[REQUESTS_MAX]."""
    count = len(requests)
    requests["next"] = np.arange(1, count + 1)
    requests["next"][count - 1] = NOBODY
    board["free"] = 0
    board["open"] = board["first_waiting"] = board["last_waiting"] = NOBODY
