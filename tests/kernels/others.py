"""Who does what a worker does not do on the spot: io_uring and helper threads, or a test in their place."""

import functools
import mmap
import os

import numpy as np
import pytest

from kernels import blk_helper, helper_record
from kernels.blk_disk import BOUNCE_BYTES, DISK
from kernels.request_record import BOARD, NOBODY, REQUEST, REQUESTS_MAX, SEGMENT_ROWS, lay_out
from kernels.uring_layout import URING
from tests.kernels.uring_jobs import AS_IF_POLLED, open_ring
from vvupipe.workers.helpers import Helpers
from vvupipe.workers.io_uring import available


class Others:
    """The slots for requests under way, and who does them. threads: False leaves the helpers to the test.

    as_if_polled: see uring_jobs.
    """

    def __init__(self, *, uring=False, as_if_polled=False, helpers=0, threads=True):
        self.segments = np.zeros((SEGMENT_ROWS, 2), np.uint64)
        self.requests = np.zeros(REQUESTS_MAX, REQUEST)
        self.boards = np.zeros(1, BOARD)
        self.tokens, self.results = np.zeros(REQUESTS_MAX, np.uint64), np.zeros(REQUESTS_MAX, np.int64)
        self._uring = open_ring(AS_IF_POLLED if as_if_polled else "best", REQUESTS_MAX) if uring else None
        self.urings = self._uring.record if uring else np.zeros(1, URING)
        if not uring:
            self.urings["fd"] = -1
        self.helpers = Helpers(helpers)
        self.disks = np.zeros(max(helpers, 1), DISK)
        # Pages of their own, as direct I/O wants them.
        self._rooms = np.frombuffer(mmap.mmap(-1, max(helpers, 1) * BOUNCE_BYTES), np.uint8).reshape(-1, BOUNCE_BYTES)
        self._scratch = np.zeros(8, np.uint64)
        self._threads = threads
        if threads:
            self.helpers.start(self._help)

    def _help(self, index):
        blk_helper.help_worker(self.helpers.records, index, self.requests, self.segments, self.disks[index])

    def begin(self, disk):
        """Work for an image, with every slot free. disk: DISK."""
        self.requests[:] = np.zeros(1, REQUEST)
        self.boards[:] = np.zeros(1, BOARD)
        lay_out(self.boards, self.requests)
        self.boards["free_helpers"] = len(self.helpers.records)
        if not self._threads:
            self.helpers.records["state"] = helper_record.IDLE  # of a test that failed
        self.disks[:] = disk
        self.disks["bounce_address"] = [room.ctypes.data for room in self._rooms]
        if self._uring:
            self._uring.register_file(int(disk["fd"]))

    @property
    def poll_fds(self):
        """The eventfds of io_uring and of the helpers."""
        return [int(self.urings["event_fd"][0]) if self._uring else -1, self.helpers.done_fd]

    def given(self):
        """Indices of the helpers that have a request."""
        return np.flatnonzero(self.helpers.records["state"] == helper_record.GIVEN).tolist()

    def request_of(self, index):
        """What a helper was given: REQUEST."""
        return self.requests[self.helpers.records["slot"][index]]

    def do(self, index, *, status=None):
        """Be the helper at `index`: do its request, or fail with `status`, and say so."""
        request = self.request_of(index)
        slot = int(self.helpers.records["slot"][index])
        if status is None:
            status = blk_helper.perform(
                self.disks[index],
                self.segments,
                np.uint64(self._scratch.ctypes.data),
                request["kind"],
                request["sector"],
                blk_helper.room_of(slot),
                request["whole_end"],
                request["write_through"],
            )
        request["status"] = status
        self.helpers.records["state"][index] = helper_record.DONE
        os.eventfd_write(self.helpers.done_fd, 1)

    def check_idle(self):
        """Nothing is under way and every slot is free, once."""
        board = self.boards[0]
        assert board["under_way"] == 0
        assert (board["open"], board["first_waiting"]) == (NOBODY, NOBODY)
        assert board["free_helpers"] == len(self.helpers.records)
        assert not self.helpers.records["state"].any()
        free, slot = set(), int(board["free"])
        while slot not in (NOBODY, REQUESTS_MAX):
            assert slot not in free
            free.add(slot)
            slot = int(self.requests["next"][slot])
        assert len(free) == REQUESTS_MAX


needs_io_uring = pytest.mark.skipif(available() is not None, reason=f"io_uring: {available()}")


@functools.cache
def shared(kind):
    """One for all tests of a process, because helper threads end with it."""
    return Others(
        uring=kind in ("uring", "polled"),
        as_if_polled=kind == "polled",
        helpers={"alone": 0, "uring": 2, "polled": 2, "helpers": 4}[kind],
    )


@functools.cache
def by_hand(helpers):
    """Helpers that are the test: `given`, `do`."""
    return Others(helpers=helpers, threads=False)
