"""A vCPU of the embedded sibling: one process, pinned to a CPU, which drives one vring of the disk in a kernel.

It is either in a kernel or executing a command. Commands are answered at once; the end of a job is told by the `done`
eventfd and the VCPU record in shared memory, so the parent can command a vCPU that is at work.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import sys

import numpy as np
import numpy.typing as npt

from kernels import driver_layout as layout
from kernels.driver_parts import PARTS
from kernels.loop_record import POLLFD, POLLIN
from vvupipe.errors import WorkerError
from vvupipe.memory.mapping import Mapping
from vvupipe.workers import commands
from vvupipe.workers.executor import CommandExecutor, command_socket
from vvupipe.workers.kernel_library import KernelLibrary

_SHARED_COUNTERS_KEPT = ("attention", "finished_jobs")


class VcpuProcess(CommandExecutor):
    """State of the process; `run` returns when the parent closes the command socket."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self._scratch = np.zeros(8, np.uint64)
        self._one = np.ones(1, np.uint64)
        self._wait = np.zeros(1, layout.WAIT)
        self._ring = np.zeros(1, layout.DRIVER_RING)
        self._ring["kick_fd"] = self._ring["call_fd"] = -1
        self._heads = np.full(1, -1, np.int32)
        self._tags = np.zeros(0, layout.TAG)
        self._job = np.zeros(1, layout.JOB)
        self._pollfds = np.zeros(2, POLLFD)
        self._pollfds["events"] = POLLIN
        self._pollfds["fd"] = (sock.fileno(), -1)
        self._parts = np.zeros(1, PARTS)
        self._job_kernel: str | None = None
        self._file_fd = -1
        self._live = False

    def run(self) -> None:
        """Execute commands, and the job's kernel in between."""
        if not self.take_first_command():
            return
        while True:
            busy = self._job_kernel is not None and self._live
            # The attention word is read before the socket is emptied: a command sent meanwhile raises it again.
            self._wait["attention_seen"] = self._record["attention"]
            if not busy:
                select.select([self._sock], [], [])
            if not self.take_commands():
                return
            if self._job_kernel is not None and self._live:
                self._enter_kernel()

    def _enter_kernel(self) -> None:
        assert self._job_kernel is not None
        status = self._call(self._job_kernel)
        if status != layout.COMMAND:
            self._finish(status)

    def _call(self, entry: str) -> int:
        """Call one of kernels/driver_entries.py."""
        parts = self._parts
        for name in ("wait", "ring", "pollfds", "tags", "heads", "job", "record", "directions", "histograms"):
            parts[name] = getattr(self, f"_{name}").ctypes.data
        parts["num_tags"] = len(self._tags)
        parts["num_heads"] = len(self._heads)
        return self._kernels.call(entry, parts.ctypes.data)

    def _finish(self, status: int) -> None:
        self._job_kernel = None
        if self._file_fd >= 0:
            os.close(self._file_fd)
            self._file_fd = -1
        record = self._record[0]
        record["status"] = status
        record["finished_jobs"] += np.uint64(1)
        os.eventfd_write(self._done_fd, 1)

    def _do_open(self, fields: commands.Fields, fds: list[int]) -> None:
        """fds: guest RAM, control memory, done eventfd."""
        os.sched_setaffinity(0, fields["cpus"])
        self._huge = bool(fields["huge"])
        self._ram = Mapping(fds[0], int(fields["mem_bytes"]), huge=self._huge)
        self._control = Mapping(fds[1], int(fields["control_bytes"]))
        self._done_fd = os.dup(fds[2])
        start = int(fields["index"]) * layout.VCPU_AREA_BYTES
        view = self._control.view
        self._record = np.frombuffer(view, layout.VCPU, 1, start)
        self._directions = np.frombuffer(view, layout.DIRECTION, 2, start + layout.DIRECTIONS_OFF)
        counts = np.frombuffer(view, np.uint64, 2 * layout.BUCKETS, start + layout.HISTOGRAMS_OFF)
        self._histograms = counts.reshape(2, layout.BUCKETS)
        wait = self._wait[0]
        wait["record"] = self._control.address + start
        wait["scratch"] = self._scratch.ctypes.data
        wait["spin_max_ns"] = wait["spin_ns"] = int(fields["spin_max_ns"])
        ring = self._ring[0]
        ring["ram"] = self._ram.address
        ring["one"] = self._one.ctypes.data
        ring["scratch"] = self._scratch.ctypes.data
        self._kernels = KernelLibrary("driver")

    def _do_ring(self, fields: commands.Fields, fds: list[int]) -> None:
        """Begin with empty rings at a place of their own; what is in flight is put on them again. fds: kick, call."""
        ring = self._ring[0]
        self._do_eventfds(fields, fds)
        for part in ("desc", "avail", "used"):
            ring[part] = self._ram.address + int(fields[f"{part}_gpa"])
        for name in ("size", "event_idx", "indirect"):
            ring[name] = int(fields[name])
        self._heads = np.full(int(ring["size"]), -1, np.int32)
        self._call("reset_ring")

    def _do_eventfds(self, fields: commands.Fields, fds: list[int]) -> None:
        """Another kick and call; the ring stays as it is. fds: kick, call."""
        ring = self._ring[0]
        for name in ("kick_fd", "call_fd"):
            if ring[name] >= 0:
                os.close(int(ring[name]))
            ring[name] = fds.pop(0)
            os.set_blocking(int(ring[name]), False)

    def _do_go(self, fields: commands.Fields, fds: list[int]) -> None:
        """The back-end has the vring: put what was in flight, and go on with the job."""
        self._call("resubmit")
        self._live = True

    def _do_go_on(self, fields: commands.Fields, fds: list[int]) -> None:
        """Another back-end has the vring as it is: go on with the job. A kick may have gone to the old one, unheard."""
        ring = self._ring[0]
        self._call("publish")
        os.eventfd_write(int(ring["kick_fd"]), 1)
        self._live = True

    def _do_pause(self, fields: commands.Fields, fds: list[int]) -> None:
        """Leave the vring alone until the next `go`."""
        self._live = False

    def _do_job(self, fields: commands.Fields, fds: list[int]) -> None:
        """Start a job. `job` has the fields of layout.JOB that are not 0; fds: the file of a transfer, if any."""
        if self._job_kernel is not None:
            raise WorkerError("the vCPU is at work")
        self._place_tags(int(fields["depth"]), int(fields["tags_gpa"]), int(fields["data_gpa"]), fields)
        job = self._job
        job[:] = np.zeros(1, layout.JOB)
        for name, value in fields["job"].items():
            job[name] = value
        job["depth"] = fields["depth"]
        job["window"] = self._ram.address + int(fields["data_gpa"])
        self._file_fd = fds.pop(0) if fds else -1
        job["file_fd"] = self._file_fd
        self._clear_counters()
        buffers_bytes = int(fields["depth"]) * int(fields["stride_bytes"])
        if self._huge:
            self._touch(int(fields["data_gpa"]), buffers_bytes or int(job["total_bytes"][0]))
        if fields["kernel"] == "workload":
            self._fill_buffers(int(fields["data_gpa"]), buffers_bytes)
        self._call("attach_tags")
        self._job_kernel = str(fields["kernel"])

    def _place_tags(self, depth: int, tags_gpa: int, data_gpa: int, fields: commands.Fields) -> None:
        self._tags = np.zeros(depth, layout.TAG)
        numbers = np.arange(depth, dtype=np.uint64)
        self._tags["place"] = np.uint64(self._ram.address + tags_gpa) + numbers * np.uint64(layout.TAG_BYTES)
        self._tags["data"] = np.uint64(self._ram.address + data_gpa) + numbers * np.uint64(fields["stride_bytes"])
        self._tags["length"] = int(fields["length_bytes"])

    def _clear_counters(self) -> None:
        record = self._record[0]
        for name in layout.VCPU.names or ():
            if name not in _SHARED_COUNTERS_KEPT and not name.startswith("_"):
                record[name] = 0
        for name in ("kicks", "calls"):
            self._ring[name] = 0
        self._wait["sleeps"] = 0
        self._directions[:] = np.zeros(2, layout.DIRECTION)
        self._histograms[:] = 0

    def _touch(self, gpa: int, size_bytes: int) -> None:
        """Touch part of the RAM before the back-end does: the first one decides on a page's size and NUMA node."""
        part = np.frombuffer(self._ram.view, np.uint8)[gpa : gpa + size_bytes]
        part[:: mmap.PAGESIZE] |= 0
        part[-1:] |= 0

    def _fill_buffers(self, data_gpa: int, size_bytes: int) -> None:
        """Random data, so that no storage below can make less of it."""
        buffer: npt.NDArray[np.uint8] = np.frombuffer(self._ram.view, np.uint8, size_bytes, data_gpa)
        buffer[:] = np.frombuffer(np.random.default_rng().bytes(size_bytes), np.uint8)

    def _do_stop(self, fields: commands.Fields, fds: list[int]) -> None:
        """Start no more requests; the job ends when those in flight are back."""
        self._job["stopping"] = 1


if __name__ == "__main__":
    VcpuProcess(command_socket(sys.argv[1:])).run()
