"""A vCPU of the embedded sibling as its parent sees it: start it, give it jobs, read its counters."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kernels import driver_layout as layout
from vvupipe.errors import ProtocolError, WorkerError
from vvupipe.fd_socket import wait_fd
from vvupipe.memory import shared
from vvupipe.memory.mapping import Mapping
from vvupipe.workers import commands
from vvupipe.workers.worker_handle import COMMAND_TIMEOUT_S, OPEN_TIMEOUT_S, WorkerDied, WorkerHandle

#: Longest time that a vCPU spins before it sleeps. A wake-up costs some 5 to 50 us, so spinning this long for an answer
#: that comes within it is cheaper than sleeping.
SPIN_MAX_NS = 200_000


@dataclass(frozen=True, slots=True)
class Counters:
    """A copy of what a vCPU counted in its present or last job."""

    record: dict[str, int]
    directions: tuple[dict[str, int], dict[str, int]]  #: of reads and of writes
    histograms: npt.NDArray[np.uint64]  #: shape (2, BUCKETS): reads, writes

    @property
    def requests(self) -> int:
        """Reads and writes that are done."""
        return self.directions[0]["requests"] + self.directions[1]["requests"]


class ControlMemory:
    """The memory that the parent shares with its vCPUs, one area each."""

    def __init__(self, num_vcpus: int) -> None:
        self.size_bytes = num_vcpus * layout.VCPU_AREA_BYTES
        self.fd = shared.create_unnamed(self.size_bytes)
        self._mapping = Mapping(self.fd, self.size_bytes)
        self._whole: npt.NDArray[np.uint8] | None = np.frombuffer(self._mapping.view, np.uint8)

    def _part(self, index: int, offset: int, size_bytes: int) -> npt.NDArray[np.uint8]:
        assert self._whole is not None
        start = index * layout.VCPU_AREA_BYTES + offset
        return self._whole[start : start + size_bytes]

    def record(self, index: int) -> npt.NDArray[np.void]:
        """The live VCPU record of a vCPU, an array of one."""
        return self._part(index, 0, layout.VCPU.itemsize).view(layout.VCPU)

    def counters(self, index: int) -> Counters:
        """A copy of a vCPU's counters."""
        record = self.record(index)[0]
        names = [name for name in layout.VCPU.names or () if not name.startswith("_")]
        directions = self._part(index, layout.DIRECTIONS_OFF, 2 * layout.DIRECTION.itemsize).view(layout.DIRECTION)
        counts = self._part(index, layout.HISTOGRAMS_OFF, 2 * layout.BUCKETS * 8).view(np.uint64)
        reads, writes = ({name: int(part[name]) for name in layout.DIRECTION.names or ()} for part in directions)
        return Counters(
            {name: int(record[name]) for name in names}, (reads, writes), counts.reshape(2, layout.BUCKETS).copy()
        )

    def close(self) -> None:
        """Unmap and close."""
        self._whole = None
        self._mapping.close()
        os.close(self.fd)


class Vcpu:
    """One vCPU process. Every method belongs to the parent's event loop."""

    def __init__(self, index: int, cpu: int, control: ControlMemory, spin_max_ns: int = SPIN_MAX_NS) -> None:
        self.index = index
        self.cpu = cpu
        self._control = control
        self._spin_max_ns = spin_max_ns
        self._record = control.record(index)
        self._done_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._handle: WorkerHandle | None = None

    def _raise_attention(self) -> None:
        self._record["attention"] += np.uint32(1)

    async def start(self, ram_fd: int, mem_bytes: int, *, huge: bool = False) -> None:
        """Start the process and have it load (the first time: compile) its kernels. huge: the RAM is in huge pages.

        Raises: WorkerError.
        """
        spawning = asyncio.create_task(WorkerHandle.spawn("vvupipe.vm.vcpu_process", self._raise_attention))
        try:
            self._handle = await asyncio.shield(spawning)
        except asyncio.CancelledError:
            self._handle = await spawning  # so that `close` can end it
            raise
        opening: commands.Fields = {
            "op": "open",
            "index": self.index,
            "cpus": [self.cpu],
            "mem_bytes": mem_bytes,
            "huge": huge,
            "control_bytes": self._control.size_bytes,
            "spin_max_ns": self._spin_max_ns,
        }
        await self._have_executed(opening, [ram_fd, self._control.fd, self._done_fd], OPEN_TIMEOUT_S)

    @property
    def pid(self) -> int | None:
        """Process id, once it was started."""
        return self._handle.pid if self._handle else None

    async def command(self, op: str, fields: commands.Fields | None = None, fds: Sequence[int] = ()) -> None:
        """Have a command executed. Raises: WorkerError."""
        await self._have_executed({**(fields or {}), "op": op}, fds, COMMAND_TIMEOUT_S)

    async def _have_executed(self, fields: commands.Fields, fds: Sequence[int], timeout_s: float) -> None:
        assert self._handle is not None
        try:
            await self._handle.command(fields, fds, timeout_s)
        except WorkerDied as error:
            raise self._end_of_process(await self._handle.wait()) from error

    def _end_of_process(self, code: int) -> WorkerError:
        how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        return WorkerError(f"vCPU {self.index} (process {self.pid}) {how}")

    async def job_done(self) -> None:
        """Wait for the end of the job. Raises: WorkerError when the process ends first."""
        assert self._handle is not None
        waiting = asyncio.create_task(wait_fd(self._done_fd))
        dying = asyncio.create_task(self._handle.wait())
        try:
            await asyncio.wait({waiting, dying}, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                raise self._end_of_process(dying.result())
            os.eventfd_read(self._done_fd)
        finally:
            waiting.cancel()
            dying.cancel()

    def counters(self) -> Counters:
        """What the present or last job counted so far."""
        return self._control.counters(self.index)

    def check_ring(self) -> None:
        """Raises: ProtocolError when the last job ended because the device broke a rule of the ring."""
        status = int(self._record["status"][0])
        if status in layout.TEXT:
            raise ProtocolError(f"the back-end broke vring {self.index}: {layout.TEXT[status]}")

    async def close(self) -> None:
        """End the process."""
        if self._handle:
            await self._handle.end()
            self._handle.release()
        if self._done_fd >= 0:
            os.close(self._done_fd)
            self._done_fd = -1
        self._record = np.zeros(1, layout.VCPU)
