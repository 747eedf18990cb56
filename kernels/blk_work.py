"""All that the kernels of a block worker work on, in one tuple: what a process has once, handed from one to another."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Record = Any  # one element of a record array, which kernels change in place


class BlockWork(NamedTuple):
    """numba takes it apart: handing it on costs nothing."""

    rings: npt.NDArray[np.void]  # ring_record.RING[n]
    running: npt.NDArray[np.int64]  # [n], the rings to look at: loop.running of them
    disk: Record  # blk_disk.DISK
    regions: npt.NDArray[np.uint64]  # [m, 5], what drivers' addresses mean (kernels.regions)
    memory: npt.NDArray[np.uint64]  # [m, 5], the front-end's memory table
    segments: npt.NDArray[np.uint64]  # [request_record.SEGMENT_ROWS, 2], the chain in hand first
    copied: npt.NDArray[np.uint64]  # [32768, 2], a chain copied out of its ring
    board: Record  # request_record.BOARD
    chains: npt.NDArray[np.void]  # ring_record.CHAIN[CHAINS_MAX], those that are looked at together
    requests: npt.NDArray[np.void]  # request_record.REQUEST[REQUESTS_MAX]
    uring: Record  # uring_layout.URING; fd -1: none
    buffers: npt.NDArray[np.uint64]  # [b, 2], address and bytes of the registered buffers, by address; may be none
    tokens: npt.NDArray[np.uint64]  # [n], room for what io_uring tells
    results: npt.NDArray[np.int64]  # [n]
    helpers: npt.NDArray[np.void]  # helper_record.HELPER[h], may be none
    scratch: np.uint64  # address of 64 bytes of this thread
    one: np.uint64  # address of a 64-bit 1
    notice_fd: np.int32  # eventfd that tells the coordinator to look at the control block
