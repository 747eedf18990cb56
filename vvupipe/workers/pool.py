"""The workers of one back-end: vring i belongs to worker i modulo their number.

The pool remembers the memory table and every started vring, so that a worker that dies is replaced by one that goes on
where it stopped. Workers start when their first vring does; the first one at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from kernels import control_block as layout
from kernels.inflight_layout import part_bytes
from kernels.status import TEXT
from vvupipe.errors import WorkerError
from vvupipe.memory.doorbell import Doorbell
from vvupipe.memory.iotlb import Translation
from vvupipe.memory.region import MemoryRegion
from vvupipe.memory.shared import create_unnamed
from vvupipe.workers import commands
from vvupipe.workers.control_block import ControlBlock
from vvupipe.workers.left_undone import LeftUndone
from vvupipe.workers.pool_memory import Command, PoolMemory
from vvupipe.workers.vring_setup import StartedVring, VringSetup
from vvupipe.workers.worker_handle import OPEN_TIMEOUT_S, WorkerDied, WorkerHandle

log = logging.getLogger(__name__)

_DEATHS_MAX = 5  # deaths of one worker within the window below: something is wrong that a new one cannot mend
_DEATHS_WINDOW_S = 10.0
_LOOK_S = 0.5  # how soon a broken vring is logged


@dataclass(frozen=True, slots=True)
class DeviceWorker:
    """How a device's workers are started: the module they run, and what its `DeviceKernel.open` is given.

    The fds stay the device's; each worker gets copies.
    """

    module: str
    fields: commands.Fields
    fds: tuple[int, ...]


class _Slot:
    """One worker's place: the process now in it, and what was asked of those before."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.handle: WorkerHandle | None = None
        self.vrings: dict[int, VringSetup] = {}
        self.deaths: deque[float] = deque(maxlen=_DEATHS_MAX)
        self.ready = asyncio.Lock()
        self.watcher: asyncio.Task[None] | None = None


class WorkerPool:
    """Coordinator side of the workers. All methods belong to the coordinator's event loop."""

    def __init__(self, device: DeviceWorker, cpus: Sequence[int], num_vrings: int, spin_max_ns: int) -> None:
        self._device = device
        self._cpus = list(cpus)
        self._spin_max_ns = spin_max_ns
        self._slots = [_Slot(index) for index in range(max(1, min(len(self._cpus), num_vrings)))]
        self.block = ControlBlock(len(self._slots), num_vrings)
        self.num_vrings = num_vrings
        self._memory = PoolMemory()
        self._left = LeftUndone()
        self._notice_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        #: called when vrings may wait for translations: `waiting` tells which
        self.on_waiting: Callable[[], None] = lambda: None
        self._closing = False
        self._told_broken: set[int] = set()
        self._looking: asyncio.Task[None] | None = None
        self.failed: asyncio.Future[WorkerError] = asyncio.get_running_loop().create_future()

    @property
    def num_workers(self) -> int:
        """Workers at most; each is started when it is first needed."""
        return len(self._slots)

    @property
    def cpus(self) -> list[int]:
        """The CPU of each worker."""
        return [self._cpus[slot.index % len(self._cpus)] for slot in self._slots]

    def pids(self) -> list[int]:
        """Process ids of the workers that run now."""
        return [slot.handle.pid for slot in self._slots if slot.handle]

    async def start(self) -> None:
        """Start the first worker, which compiles the kernels if nobody did. Raises: WorkerError."""
        await self._worker(self._slots[0])
        self._looking = asyncio.create_task(self._look_for_broken())
        asyncio.get_running_loop().add_reader(self._notice_fd, self._notice)

    async def close(self) -> None:
        """End every worker and forget the memory."""
        self._closing = True
        if self._looking:
            self._looking.cancel()
        for slot in self._slots:
            if slot.watcher:
                slot.watcher.cancel()
        await asyncio.gather(*(slot.handle.end() for slot in self._slots if slot.handle))
        for slot in self._slots:
            slot.handle = None
            for setup in slot.vrings.values():
                setup.close()
            slot.vrings.clear()
        asyncio.get_running_loop().remove_reader(self._notice_fd)
        os.close(self._notice_fd)
        self._left.forget_all()
        self._memory.close()

    async def set_memory(self, regions: Sequence[MemoryRegion]) -> None:
        """Give all workers a new memory table; the pool owns `regions` from here on.

        Those of the former table may be in it again, as the same objects. Raises: WorkerError when one cannot be
        mapped; then the former table stays.
        """
        numbers, mapping = self._memory.add(regions)
        try:
            for command in mapping:
                await self._to_all(command)
        except WorkerError:
            self._memory.drop_unused()
            raise
        await self._to_all(self._memory.use(numbers))
        self._memory.drop_unused()

    async def change_translations(
        self, *, invalidate: Sequence[tuple[int, int]] = (), update: Sequence[Translation] = ()
    ) -> None:
        """Forget driver addresses (start, bytes), then add translations. Raises: WorkerError."""
        await self._to_all(self._memory.change_translations(list(invalidate), list(update)))

    async def forget_translations(self) -> None:
        """Forget every translation. Raises: WorkerError."""
        if len(self._memory.iotlb):
            await self._to_all(self._memory.forget_translations())

    def translation(self, iova: int) -> Translation | None:
        """What is known of a driver address."""
        return self._memory.iotlb.find(iova)

    def waiting(self) -> list[tuple[int, int, int]]:
        """(vring, driver address, kernels.virtio_layout.ACCESS_*) of each vring that waits for a translation."""
        indices = [index for slot in self._slots for index in slot.vrings]
        records = [(index, self.block.vrings[index]) for index in indices]
        return [
            (index, int(record["miss_iova"]), int(record["miss_access"]))
            for index, record in records
            if record["state"] == layout.VRING_WAITING
        ]

    def _notice(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._notice_fd)
        self.on_waiting()

    async def set_log(self, fd: int, size_bytes: int, offset: int) -> None:
        """Mark what is written to guest memory in the log at `offset` of `fd`, which the pool owns; (-1, 0, 0): no log.

        Raises: WorkerError when it cannot be mapped.
        """
        await self._to_all(self._memory.set_log(fd, size_bytes, offset))

    async def set_log_event(self, fd: int) -> None:
        """The eventfd to write when the log has news, which the pool owns; -1: none."""
        await self._to_all(self._memory.set_log_event(fd))

    async def set_log_used(self, index: int, *, on: bool, gpa: int) -> None:
        """Whether writes to a running vring's used ring are logged, and from which address on."""
        slot = self._slot(index)
        slot.vrings[index].log_used = on
        slot.vrings[index].log_gpa = gpa
        await self._command(slot, {"op": "log_used", "index": index, "on": on, "gpa": gpa})

    async def set_write_through(self, on: bool) -> None:
        """Whether, for vrings that run, nothing may stay in a cache when a request completes."""
        for slot in self._slots:
            for setup in slot.vrings.values():
                setup.write_through = on
        await self._to_all(({"op": "write_through", "on": on}, []))

    async def start_vring(self, setup: VringSetup) -> StartedVring:
        """Serve a vring; the pool owns `setup` from here on.

        Raises: WorkerError when its addresses are bad, UserError or OSError when there is no room for its requests.
        """
        slot = self._slot(setup.index)
        self._forget(slot, setup.index)
        try:
            self._give_inflight(setup)
            await self._worker(slot)  # before the setup is remembered, or a new worker would be given it twice
        except BaseException:
            setup.close()
            raise
        slot.vrings[setup.index] = setup
        try:
            answer = await self._start(slot, setup)
        except WorkerError:
            self._forget(slot, setup.index)
            raise
        return StartedVring(int(answer["last_avail_idx"]), int(answer["again"]), bool(answer["waits"]))

    async def _start(self, slot: _Slot, setup: VringSetup) -> commands.Fields:
        """Start a vring. A worker whose guest memory has lost pages makes way for another one, but only once."""
        handle = await self._worker(slot)
        try:
            return await handle.command(*setup.start_command(makes_way=True))
        except WorkerDied:
            await handle.wait()
            await asyncio.sleep(0)
        return await self._command(slot, *setup.start_command())

    def _give_inflight(self, setup: VringSetup) -> None:
        """See that a vring has an inflight region. Raises: UserError, OSError when there is no room for one."""
        left = self._left.take(setup)
        if setup.inflight_fd >= 0:
            if left >= 0:
                os.close(left)
            return
        # Requests complete in any order: the ring itself does not tell which a worker that died had not done.
        setup.own_inflight = True
        setup.inflight_bytes = part_bytes(setup.size, packed=setup.packed)
        setup.inflight_offset = 0
        setup.inflight_fd = left if left >= 0 else create_unnamed(setup.inflight_bytes)

    async def stop_vring(self, index: int) -> int:
        """Stop a vring, when all its requests that were taken are done. Returns last_avail_idx.

        What was to be done again and waits for a translation cannot be done: it is when the vring starts there again.
        """
        slot = self._slot(index)
        self._tell_broken(index)
        answer = await self._command(slot, {"op": "stop", "index": index})
        self._told_broken.discard(index)
        position, undone = int(answer["last_avail_idx"]), int(answer["undone"])
        if undone:
            log.warning("vring %d stopped with %d requests that wait for a translation to be done again", index, undone)
            if slot.vrings[index].own_inflight:
                self._left.keep(slot.vrings[index], position)
        self._forget(slot, index)
        return position

    def forget_undone(self) -> None:
        """Nobody goes on with the vrings that stopped."""
        self._left.forget_all()

    async def replace_doorbell(self, index: int, which: str, doorbell: Doorbell | None) -> None:
        """Change the `call` or `err` doorbell of a running vring; the pool owns it from here on."""
        slot = self._slot(index)
        setup = slot.vrings[index]
        old: Doorbell | None = getattr(setup, which)
        setattr(setup, which, doorbell)
        if old:
            old.close()
        await self._command(
            slot,
            {"op": "eventfd", "index": index, "which": f"{which}_fd"},
            [doorbell.fd] if doorbell else [],
        )

    async def device_command(self, fields: commands.Fields) -> None:
        """Send a command of the device's own to every worker that runs."""
        await self._to_all(({"op": "device", "command": fields}, []))

    async def _look_for_broken(self) -> None:
        """Log what workers, which cannot, found out about their drivers."""
        while True:
            await asyncio.sleep(_LOOK_S)
            for slot in self._slots:
                for index in slot.vrings:
                    self._tell_broken(index)

    def _tell_broken(self, index: int) -> None:
        record = self.block.vrings[index]
        if record["state"] == layout.VRING_BROKEN and index not in self._told_broken:
            self._told_broken.add(index)
            reason = TEXT.get(int(record["error"]), "it broke a rule of virtqueues")
            log.warning("vring %d is stopped until the front-end starts it again: %s", index, reason)

    def _slot(self, vring: int) -> _Slot:
        return self._slots[vring % len(self._slots)]

    @staticmethod
    def _forget(slot: _Slot, index: int) -> None:
        setup = slot.vrings.pop(index, None)
        if setup:
            setup.close()

    async def _to_all(self, command: Command) -> None:
        """Give a command to every worker, also to those that are being brought up: who may not know of it yet."""
        with self._memory.fds_kept():
            slots = [slot for slot in self._slots if slot.handle or slot.ready.locked()]
            # All have ended when this returns: what the command names may be closed then.
            results = await asyncio.gather(*(self._command(slot, *command) for slot in slots), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _command(self, slot: _Slot, fields: commands.Fields, fds: Sequence[int] = ()) -> commands.Fields:
        while True:
            handle = await self._worker(slot)
            try:
                return await handle.command(fields, fds)
            except WorkerDied:
                await handle.wait()
                await asyncio.sleep(0)

    async def _worker(self, slot: _Slot) -> WorkerHandle:
        """The slot's worker, started and brought up to date when there is none."""
        async with slot.ready:
            if slot.handle:
                return slot.handle
            if self._closing:
                raise WorkerError("the back-end is closing")
            while True:
                handle = await WorkerHandle.spawn(self._device.module, partial(self.block.raise_attention, slot.index))
                try:
                    await self._bring_up(slot, handle)
                    break
                except WorkerDied:
                    await handle.end()
                    self._note_death(slot)
                except WorkerError:
                    await handle.end()
                    raise
            slot.handle = handle
            slot.watcher = asyncio.create_task(self._watch(slot, handle))
            return handle

    async def _bring_up(self, slot: _Slot, handle: WorkerHandle) -> None:
        opening = {
            "op": "open",
            "worker": slot.index,
            "num_workers": len(self._slots),
            "num_vrings": self.num_vrings,
            "cpus": [self._cpus[slot.index % len(self._cpus)]],
            "spin_max_ns": self._spin_max_ns,
            "device": self._device.fields,
        }
        await handle.command(opening, [self.block.fd, self._notice_fd, *self._device.fds], OPEN_TIMEOUT_S)
        with self._memory.fds_kept():
            coming = self._memory.coming()
            # What it refuses, as memory that was truncated meanwhile, breaks vrings, and is no reason to do without it.
            for command in [*self._memory.commands(), *coming]:
                await self._try(handle, command, "memory")
        for setup in list(slot.vrings.values()):
            if slot.vrings.get(setup.index) is setup:  # else it was forgotten meanwhile, its fds are closed
                await self._try(handle, setup.start_command(), f"vring {setup.index}")

    @staticmethod
    async def _try(handle: WorkerHandle, command: Command, what: str) -> None:
        """A command that a new worker may refuse without being useless."""
        try:
            await handle.command(*command)
        except WorkerDied:
            raise
        except WorkerError as error:
            log.warning("%s could not be given to the new worker: %s", what, error)

    async def _watch(self, slot: _Slot, handle: WorkerHandle) -> None:
        """Replace the worker when it dies."""
        code = await handle.wait()
        handle.release()
        slot.handle = None
        if self._closing:
            return
        log.warning(
            "worker %d (process %d) %s; its %d vrings go to a new one",
            slot.index,
            handle.pid,
            f"was killed by signal {-code}" if code < 0 else f"ended with status {code}",
            len(slot.vrings),
        )
        try:
            if code != commands.MEMORY_LOST:
                self._note_death(slot)
            await self._worker(slot)
        except WorkerError as error:
            if not self.failed.done():
                self.failed.set_result(error)

    def _note_death(self, slot: _Slot) -> None:
        slot.deaths.append(time.monotonic())
        if len(slot.deaths) == _DEATHS_MAX and slot.deaths[-1] - slot.deaths[0] < _DEATHS_WINDOW_S:
            error = WorkerError(f"worker {slot.index} died {_DEATHS_MAX} times within {_DEATHS_WINDOW_S:.0f} s")
            if not self.failed.done():
                self.failed.set_result(error)
            raise error
