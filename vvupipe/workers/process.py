"""A worker process: it maps what the coordinator hands it and serves vrings in a kernel until a command waits.

One thread, which is either in the kernel or executing a command. A device's worker module makes a `DeviceKernel` and
calls `main`; this module knows nothing of the device.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kernels import control_block as layout
from kernels.loop_record import LOOP, POLLFD, POLLIN
from kernels.ring_record import RING
from kernels.status import ERR_MEMORY_GONE, ERR_RING_ADDRESS, MISS, OK, TEXT
from vvupipe.errors import WorkerError
from vvupipe.memory.mapping import Mapping
from vvupipe.workers import bus_error_handler, commands, inflight_position
from vvupipe.workers.control_block import ControlBlock
from vvupipe.workers.executor import CommandExecutor, command_socket
from vvupipe.workers.kernel_library import KernelLibrary
from vvupipe.workers.worker_memory import Table, WorkerMemory

log = logging.getLogger(__name__)

#: fields of RING that a start brings
_SETUP = (
    "size",
    "packed",
    "iotlb",
    "event_idx",
    "indirect",
    "in_order",
    "write_through",
    "log_used",
    "log_gpa",
)
#: those that go on from where they were
_COUNTERS = (
    "requests",
    "errors",
    "read_bytes",
    "written_bytes",
    "flushes",
    "kicks",
    "calls",
    "turns",
    "waiting_sum",
)


class DeviceKernel(Protocol):
    """The device's part of a worker."""

    #: Its kernels are in kernels/LIBRARY_entries.py, with those that start and stop a vring.
    library: str

    def open(
        self,
        fields: commands.Fields,
        fds: list[int],
        kernels: KernelLibrary,
        loop: npt.NDArray[np.void],
        num_vrings: int,
    ) -> list[int]:
        """Take over the device's own fds and numbers. loop: loop_record.LOOP[1], which stays where it is.

        Returns the files that are polled besides kicks, -1 for none. Raises: OSError, ValueError.
        """

    def use_memory(self, memory: Table) -> None:
        """The memory table is another one from here on."""

    def serve(
        self,
        rings: npt.NDArray[np.void],
        pollfds: npt.NDArray[np.void],
        regions: Table,
        memory: Table,
    ) -> None:
        """Run the device's kernel until a command waits.

        rings: RING[n]; pollfds: POLLFD, the command socket, then a kick for each ring, then the device's own. regions:
        uint64[m, 5], what drivers' addresses mean; memory: uint64[m, 5], the memory table (kernels.region_table).
        """

    def serve_again(
        self,
        rings: npt.NDArray[np.void],
        pollfds: npt.NDArray[np.void],
        regions: Table,
        memory: Table,
        index: int,
    ) -> int:
        """Do what is to be done again in one ring, as far as there is room. Returns how many are left."""

    def drain(self, rings: npt.NDArray[np.void], pollfds: npt.NDArray[np.void], memory: Table) -> None:
        """Wait until no request is under way."""

    def command(self, fields: commands.Fields) -> None:
        """A command of the device's own. Raises: WorkerError when it is unknown."""


class Worker(CommandExecutor):
    """State of one worker; `run` returns when the coordinator closes the command socket."""

    def __init__(self, sock: socket.socket, device: DeviceKernel) -> None:
        super().__init__(sock)
        self._device = device
        self._memory = WorkerMemory()
        self._addresses: dict[int, tuple[int, int, int]] = {}
        self._to_resume: dict[int, int] = {}  # vring -> base, of those whose memory was not looked at yet
        self._resubmit: dict[int, npt.NDArray[np.int64]] = {}
        self._inflight: dict[int, Mapping] = {}
        self._log_fd = -1
        self._scratch = np.zeros(8, np.uint64)
        self._one = np.ones(1, np.uint64)
        self._loop = np.zeros(1, LOOP)

    def run(self) -> None:
        """Take the `open` command, then serve and execute commands in turn."""
        if not self.take_first_command():
            return
        while True:
            # The attention word is read before the socket is emptied: a command sent meanwhile raises it again.
            self._loop["attention_seen"] = self._block.workers["attention"][self._index]
            if not self.take_commands():
                return
            self._serve()

    def _serve(self) -> None:
        self._device.serve(self._rings, self._pollfds, self._regions(), self._memory.table)

    def _regions(self) -> Table:
        """What drivers' addresses mean."""
        # Who has an IOTLB has it for every vring: the feature is the device's. One that could not start tells nothing.
        served = np.isin(self._rings["state"], (layout.VRING_RUNNING, layout.VRING_WAITING))
        translated = bool(np.any(self._rings["iotlb"][served]))
        return self._memory.translations if translated else self._memory.table

    def _serve_again(self, index: int) -> None:
        """Do what a worker that died had under way in a ring, as long as that runs."""
        ring = self._rings[index]
        arguments = (self._rings, self._pollfds, self._regions(), self._memory.table, index)
        while ring["state"] == layout.VRING_RUNNING and self._device.serve_again(*arguments):
            self._drain()

    def _drain(self) -> None:
        """Nobody touches guest memory, the image or the log from here on, until `_serve`."""
        self._device.drain(self._rings, self._pollfds, self._memory.table)

    def _do_open(self, fields: commands.Fields, fds: list[int]) -> None:
        self._index = int(fields["worker"])
        os.sched_setaffinity(0, fields["cpus"])
        num_vrings = int(fields["num_vrings"])
        self._block = ControlBlock(int(fields["num_workers"]), num_vrings, fds.pop(0))
        address = self._block.worker_address(self._index)
        self._kernels = KernelLibrary(self._device.library)
        bus_error_handler.install(self._kernels.address("on_bus_error", 3), address)
        self._rings = np.zeros(num_vrings, RING)
        for name in ("kick_fd", "call_fd", "err_fd", "log_fd"):
            self._rings[name] = -1
        self._rings["index"] = np.arange(num_vrings)
        self._rings["record"] = [self._block.vring_address(k) for k in range(num_vrings)]
        loop = self._loop[0]
        loop["record"] = address
        loop["scratch"] = self._scratch.ctypes.data
        loop["one"] = self._one.ctypes.data
        loop["notice_fd"] = fds.pop(0)
        loop["spin_max_ns"] = loop["spin_ns"] = int(fields["spin_max_ns"])
        self._block.workers["memory_errors"][self._index] = 0
        loop["stages"] = self._block.stages_address(self._index)
        if loop["stages"]:
            self._kernels.call("count_stages", loop["stages"], loop["scratch"])
        own_fds = self._device.open(fields["device"], fds, self._kernels, self._loop, num_vrings)
        self._pollfds = np.zeros(1 + num_vrings + len(own_fds), POLLFD)
        self._pollfds["events"] = POLLIN
        self._pollfds["fd"] = -1
        self._pollfds["fd"][0] = self._sock.fileno()
        self._pollfds["fd"][1 + num_vrings :] = own_fds

    def _do_map(self, fields: commands.Fields, fds: list[int]) -> None:
        """Map regions for the table that comes next."""
        self._memory.map(fields, fds)

    def _do_memory(self, fields: commands.Fields, fds: list[int]) -> None:
        """Replace the memory table; rings that run go on at their new addresses."""
        self._drain()
        unused = self._memory.set_table(fields)
        self._device.use_memory(self._memory.table)
        self._place_again()
        for mapping in unused:
            mapping.close()
        if not len(self._memory.table):
            self._block.workers["memory_errors"][self._index] = 0  # nothing is left that could lack a page

    def _do_iotlb(self, fields: commands.Fields, fds: list[int]) -> None:
        """Change translations; rings that waited for one look again."""
        if self._memory.takes_away(fields):
            self._drain()
        self._memory.change_translations(fields)
        self._place_again()

    def _place_again(self) -> None:
        for index in np.flatnonzero(self._rings["state"] == layout.VRING_RUNNING):
            self._enter(int(index))
        for index in np.flatnonzero(self._rings["state"] == layout.VRING_WAITING):
            self._enter(int(index))

    def _place(self, index: int) -> int:
        tables = (self._memory.table, self._memory.translations)
        sizes = (number for table in tables for number in (table.ctypes.data, len(table)))
        return self._kernels.call("place_ring", self._ring_address(index), *sizes, *self._addresses[index])

    def _ring_address(self, index: int) -> int:
        return int(self._rings.ctypes.data + index * RING.itemsize)

    def _set_state(self, index: int, state: int) -> None:
        self._kernels.call("set_state", self._ring_address(index), state)

    def _publish(self, index: int) -> None:
        self._kernels.call("publish", self._ring_address(index), self._one.ctypes.data)

    def _enter(self, index: int) -> int:
        """Place a ring and run it; it waits when a translation is lacking, and breaks when it cannot be placed."""
        ring = self._rings[index]
        status = self._place(index)
        if status == OK and index in self._to_resume:
            status = self._resume(index)
        if status == OK:
            if ring["state"] != layout.VRING_RUNNING:
                self._set_state(index, layout.VRING_RUNNING)
        elif status == MISS:
            self._set_state(index, layout.VRING_WAITING)
            os.eventfd_write(int(self._loop["notice_fd"][0]), 1)
        else:
            ring["error"] = status
            self._set_state(index, layout.VRING_BROKEN)
            if ring["err_fd"] >= 0:
                with contextlib.suppress(OSError):  # it is the front-end's, and may be anything
                    os.eventfd_write(int(ring["err_fd"]), 1)
        return status

    def _resume(self, index: int) -> int:
        """Find where the ring stands, which takes its memory."""
        ring = self._rings[index]
        heads = np.zeros(int(ring["size"]), np.int64)
        counters = np.zeros(int(ring["size"]), np.uint64)
        found = np.zeros(1, np.int64)
        room = (heads.ctypes.data, counters.ctypes.data, found.ctypes.data)
        status = self._kernels.call("resume", self._ring_address(index), self._to_resume[index], *room)
        if status == OK:
            count = int(found[0])
            self._resubmit[index] = heads[:count][np.argsort(counters[:count], kind="stable")]
            ring["resubmit"] = self._resubmit[index].ctypes.data
            self._publish(index)
            del self._to_resume[index]
        return status

    def _do_start(self, fields: commands.Fields, fds: list[int]) -> commands.Fields:
        index = int(fields["index"])
        ring = self._rings[index]
        if ring["state"] in (layout.VRING_RUNNING, layout.VRING_WAITING):
            return self._position(index)  # given to us already when we took over
        if self._block.workers["memory_errors"][self._index]:
            if not fields["makes_way"]:
                raise WorkerError(f"vring {index}: {TEXT[ERR_MEMORY_GONE]}")
            # Where pages were lost there are empty ones now; a new process has the memory as it is.
            log.warning("guest memory had lost pages: another worker takes over")
            os._exit(commands.MEMORY_LOST)
        self._let_go(index)
        for name in ("kick_fd", "call_fd", "err_fd"):
            ring[name] = fds.pop(0) if fields[name] else -1
        if ring["kick_fd"] >= 0:
            os.set_blocking(int(ring["kick_fd"]), False)
        for name in _SETUP:
            ring[name] = int(fields[name])
        record = self._block.vrings[index]
        for name in _COUNTERS:
            ring[name] = record[name]
        ring["error"] = 0
        ring["last_avail_idx"] = ring["used_idx"] = fields["base"]
        if fields["inflight_bytes"]:
            self._inflight[index] = Mapping(fds[0], int(fields["inflight_bytes"]), int(fields["inflight_offset"]))
            ring["inflight"] = self._inflight[index].address
        self._addresses[index] = (fields["desc_uva"], fields["avail_uva"], fields["used_uva"])
        self._to_resume[index] = int(fields["base"])
        # Whoever served it before may have died between the used ring and the call: one call too many does no harm.
        ring["signalled_valid"] = 0
        status = self._enter(index)
        if status not in (OK, MISS):
            ring["last_avail_idx"], _ = self._stopped_at(index)
            self._to_resume.pop(index, None)
            self._let_go(index)
            raise WorkerError(f"vring {index}: {TEXT.get(status, TEXT[ERR_RING_ADDRESS])}")
        return self._position(index)

    def _position(self, index: int) -> commands.Fields:
        ring = self._rings[index]
        return {
            "last_avail_idx": int(ring["last_avail_idx"]),
            "again": int(ring["resubmit_count"] - ring["resubmit_next"]),
            "waits": bool(ring["state"] == layout.VRING_WAITING),
        }

    def _do_stop(self, fields: commands.Fields, fds: list[int]) -> commands.Fields:
        """End serving a ring. `undone`: requests that were taken and cannot be done now, their ring being elsewhere."""
        index = int(fields["index"])
        ring = self._rings[index]
        self._serve_again(index)
        self._drain()
        position, undone = self._stopped_at(index)
        ring["last_avail_idx"] = position
        if ring["state"] == layout.VRING_RUNNING:
            self._kernels.call("want_kicks", self._ring_address(index))
        self._set_state(index, layout.VRING_STOPPED)
        self._let_go(index)
        self._to_resume.pop(index, None)
        ring["iotlb"] = ring["resubmit_count"] = ring["resubmit_next"] = 0
        return {"last_avail_idx": position, "undone": undone}

    def _stopped_at(self, index: int) -> tuple[int, int]:
        """(last_avail_idx, requests that are to be done again and cannot be: their ring or buffers are elsewhere)."""
        ring = self._rings[index]
        position, undone = int(ring["last_avail_idx"]), 0
        if ring["state"] == layout.VRING_WAITING:
            undone = int(ring["resubmit_count"] - ring["resubmit_next"])
        if index in self._to_resume and index in self._inflight:
            part = self._inflight[index].view
            found = inflight_position.of(part, int(ring["size"]), packed=bool(ring["packed"]))
            position, undone = found or (position, undone)
        return position, undone

    def _do_write_through(self, fields: commands.Fields, fds: list[int]) -> None:
        """Whether writes go to the disk before they complete, for every ring from here on."""
        self._drain()
        self._rings["write_through"] = int(fields["on"])

    def _do_log(self, fields: commands.Fields, fds: list[int]) -> None:
        """The dirty-page log of every ring; its eventfd is the second file, if there is one."""
        self._drain()
        self._rings["log_bytes"] = 0
        address, size_bytes = self._memory.map_log(fields, fds)
        if self._log_fd >= 0:
            os.close(self._log_fd)
        self._log_fd = fds.pop(1) if len(fds) > 1 else -1
        self._rings["log_address"] = address
        self._rings["log_bytes"] = size_bytes
        self._rings["log_fd"] = self._log_fd

    def _do_log_used(self, fields: commands.Fields, fds: list[int]) -> None:
        """Whether and where one ring's used ring is logged."""
        self._drain()
        ring = self._rings[int(fields["index"])]
        ring["log_used"] = int(fields["on"])
        ring["log_gpa"] = int(fields["gpa"])

    def _do_eventfd(self, fields: commands.Fields, fds: list[int]) -> None:
        """Replace one of a ring's eventfds while it may be running."""
        ring = self._rings[int(fields["index"])]
        name = fields["which"]
        old = int(ring[name])
        ring[name] = fds.pop(0) if fds else -1
        if old >= 0:
            os.close(old)
        if name == "call_fd":
            ring["signalled_valid"] = 0  # a call may have gone to the old one, unheard

    def _do_device(self, fields: commands.Fields, fds: list[int]) -> None:
        self._drain()
        self._device.command(fields["command"])

    def _do_ping(self, fields: commands.Fields, fds: list[int]) -> None:
        """Nothing but the answer."""

    def _let_go(self, index: int) -> None:
        """Close what a ring has of its own."""
        ring: Any = self._rings[index]
        ring["inflight"] = 0
        if mapping := self._inflight.pop(index, None):
            mapping.close()
        for name in ("kick_fd", "call_fd", "err_fd"):
            if ring[name] >= 0:
                os.close(int(ring[name]))
                ring[name] = -1


def main(arguments: list[str], device: DeviceKernel) -> None:
    """Entry of a device's worker module: `--fd N --parent PID`."""
    Worker(command_socket(arguments), device).run()
