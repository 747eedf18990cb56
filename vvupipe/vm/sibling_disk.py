"""The embedded sibling's disk: the connection to its back-end, its vrings, and the vCPUs that drive them.

A back-end that goes away is waited for. When it is back, it goes on with the vrings as they are if it has the inflight
region of the one before; otherwise they begin anew, and every request that was in flight is put on them once more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from kernels.driver_layout import ERR_FILE
from kernels.virtio_layout import (
    BLK_ID_BYTES,
    BLK_T_FLUSH,
    BLK_T_GET_ID,
    F_RING_EVENT_IDX,
    F_RING_INDIRECT_DESC,
    USED_IDX,
)
from vvupipe.errors import Disconnected, ProtocolError, Refused, TransportError, UserError, VvupipeError
from vvupipe.fd_socket import close_all
from vvupipe.memory import huge_pages, shared
from vvupipe.memory.mapping import Mapping
from vvupipe.memory.region import MemoryRegion
from vvupipe.vhost_user.frontend import Frontend
from vvupipe.vhost_user.messages import ProtocolFeature
from vvupipe.vm.disk_facts import CONFIG_BYTES, FEATURES, DiskFacts
from vvupipe.vm.disk_probe import printable
from vvupipe.vm.patience import Patience
from vvupipe.vm.sibling_inflight import LeftAtSize, SiblingInflight
from vvupipe.vm.sibling_layout import RING_PLACES, UVA_BASE, RamLayout, RingPlace, tags_max
from vvupipe.vm.vcpu import SPIN_MAX_NS, ControlMemory, Counters, Vcpu

log = logging.getLogger(__name__)

#: What this driver makes use of.
PROTOCOL_FEATURES = (
    ProtocolFeature.MQ | ProtocolFeature.CONFIG | ProtocolFeature.REPLY_ACK | ProtocolFeature.INFLIGHT_SHMFD
)

_STOP_TIMEOUT_S = 2.0  # for the orderly end of the vrings, which the back-end must not hold up
_LATER_KERNELS_S = 3.0  # compiling that takes longer is worth a line
_SETTLED_S = 1.0  # a back-end that stayed for so long had come, whether there was anything to do or not
_LEFT_AT_SIZE_MAX = 3  # a back-end that leaves so often in a row at the size of the vrings does so because of it


class SiblingDisk:
    """A virtio-blk disk behind a vhost-user socket, `num_vrings` of its queues in use, one vCPU each.

    say: gets the lines that are for the user while something is waited for. hugepages: the RAM is in huge pages
    (Raises: UserError when there are none).
    """

    def __init__(
        self,
        socket_path: Path,
        *,
        mem_bytes: int,
        cpus: Sequence[int],
        num_vrings: int,
        queue_size: int,
        timeout_s: float | None,
        say: Callable[[str], None],
        spin_max_ns: int = SPIN_MAX_NS,
        hugepages: bool = False,
    ) -> None:
        self.layout = RamLayout(mem_bytes, num_vrings, queue_size)
        self._path = socket_path
        self._timeout_s = timeout_s
        self._say = say
        #: None: pages of the usual size
        self.pages = huge_pages.choose(mem_bytes) if hugepages else None
        self._ram_fd = (
            huge_pages.create("vvupipe-sibling", mem_bytes, self.pages)
            if self.pages
            else shared.create_unnamed(mem_bytes)
        )
        self.ram = Mapping(self._ram_fd, mem_bytes, huge=hugepages)
        self._control = ControlMemory(num_vrings)
        self.vcpus = [Vcpu(index, cpus[index % len(cpus)], self._control, spin_max_ns) for index in range(num_vrings)]
        self._frontend: Frontend | None = None
        self._facts: DiskFacts | None = None
        self._err_fds: list[int] = []
        self._inflight = SiblingInflight(num_vrings, queue_size, say)
        self._beginnings = 0  # how often the vrings began at index 0
        self._left_at_size = 0  # how often in a row the back-end left when it was told of the size of the vrings
        self._supervisor: asyncio.Task[None] | None = None
        #: Done when the disk is lost for good, with the error that says why.
        self.failed: asyncio.Future[VvupipeError] = asyncio.get_running_loop().create_future()
        self.reconnects = 0

    @property
    def facts(self) -> DiskFacts:
        """What the back-end told of its disk."""
        assert self._facts is not None
        return self._facts

    @property
    def depth_max(self) -> int:
        """Requests that can be in flight in one vring."""
        return tags_max(self.layout.queue_size, indirect=self.facts.has(F_RING_INDIRECT_DESC))

    async def open(self) -> None:
        """Start the vCPUs, connect, start the vrings.

        Raises: UserError when no back-end comes or stays, or has too few or too small queues; ProtocolError,
        WorkerError.
        """
        starting = asyncio.create_task(self._start_vcpus())
        connecting = asyncio.create_task(self._connect(Patience(self._path, self._timeout_s)))
        try:
            # Whichever fails first ends it: nobody waits for a back-end with vCPUs that cannot start.
            await asyncio.wait({starting, connecting}, return_when=asyncio.FIRST_EXCEPTION, timeout=_LATER_KERNELS_S)
            if connecting.done() and not connecting.exception() and not starting.done():
                self._say("compiling the kernels, which is needed once")
            await asyncio.wait({starting, connecting}, return_when=asyncio.FIRST_EXCEPTION)
            for task in (connecting, starting):
                if task.done():
                    task.result()
            # Its time begins here: what compiling took is not the back-end's fault.
            patience = Patience(self._path, self._timeout_s)
            while not await self._start_vrings():
                await patience.pause()
                await self._connect(patience)
        finally:
            for task in (connecting, starting):
                task.cancel()
            await asyncio.wait({starting, connecting})
        self._supervisor = asyncio.create_task(self._supervise())
        self._supervisor.add_done_callback(self._supervisor_ended)

    async def _start_vcpus(self) -> None:
        huge = self.pages is not None
        await asyncio.gather(*(each.start(self._ram_fd, self.layout.mem_bytes, huge=huge) for each in self.vcpus))

    async def _connect(self, patience: Patience) -> None:
        """Find the back-end and negotiate, again and again until it does not leave in between."""
        while True:
            self._frontend = await Frontend.connect(self._path, patience.left_s, self._say)
            try:
                await self._negotiate(self._frontend)
                return
            except Disconnected as error:
                log.info("the back-end left while it was asked for its disk: %s", error)
                await self._frontend.close()
                await patience.pause()

    async def _negotiate(self, frontend: Frontend) -> None:
        taken = await frontend.negotiate_protocol(PROTOCOL_FEATURES)
        if ProtocolFeature.CONFIG not in taken:
            raise ProtocolError("the back-end has no configuration space (CONFIG): it cannot tell the size of its disk")
        queues = await frontend.get_queue_num()
        config = await frontend.get_config(0, CONFIG_BYTES)
        facts = DiskFacts.from_config(frontend.features, config, queues, frontend.protocol_features)
        if self._facts is not None:
            self._facts.check_same(facts)
        elif len(self.vcpus) > facts.num_queues:
            raise UserError(
                f"{len(self.vcpus)} jobs need as many queues and the back-end has {facts.num_queues}: "
                f"use --numjobs {facts.num_queues} or less"
            )
        self._facts = facts
        await frontend.set_features(facts.features & FEATURES)
        region = MemoryRegion(0, self.layout.mem_bytes, UVA_BASE, self._ram_fd, 0)
        await frontend.set_memory_table([region])

    async def _start_vrings(self) -> bool:
        """Begin all vrings at index 0, or go on with them. False when the back-end left meanwhile.

        Raises: UserError when it takes none of this size.
        """
        frontend = self._frontend
        assert frontend is not None
        try:
            goes_on = await self._inflight.hand_over(frontend)
            if not goes_on:
                self._beginnings += 1
            for vcpu in self.vcpus:
                await self._start_vring(frontend, vcpu, goes_on=goes_on)
        except Disconnected as error:
            log.info("the back-end left during the start of the vrings: %s", error)
            self._inflight.left_early()
            await frontend.close()
            self._left_at_size = self._left_at_size + 1 if isinstance(error, LeftAtSize) else 0
            if self._left_at_size == _LEFT_AT_SIZE_MAX:
                raise self._too_large() from error
            return False
        self._left_at_size = 0
        for vcpu in self.vcpus:
            await vcpu.command("go_on" if goes_on else "go")
        return True

    async def _start_vring(self, frontend: Frontend, vcpu: Vcpu, *, goes_on: bool) -> None:
        index = vcpu.index
        place = self.layout.vrings[index].rings[self._beginnings % RING_PLACES]
        # New eventfds each time: what the last back-end still writes to its own wakes nobody.
        fds = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(3)]
        kick, call, err = fds
        try:
            if goes_on:
                await vcpu.command("eventfds", fds=[kick, call])
            else:
                await self._begin_ring(vcpu, place, [kick, call])
            await self._tell_size(frontend, index)
            await frontend.set_vring_addr(
                index,
                descriptor_uva=UVA_BASE + place.desc_gpa,
                available_uva=UVA_BASE + place.avail_gpa,
                used_uva=UVA_BASE + place.used_gpa,
            )
            await frontend.set_vring_base(index, self._used_idx(place))
            await frontend.set_vring_err(index, err)
            await frontend.set_vring_call(index, call)
            await frontend.set_vring_kick(index, kick)
            await frontend.set_vring_enable(index, True)
            self._watch_err(index, os.dup(err))
        finally:
            close_all(fds)

    async def _tell_size(self, frontend: Frontend, index: int) -> None:
        try:
            await frontend.set_vring_num(index, self.layout.queue_size)
            if ProtocolFeature.REPLY_ACK not in frontend.protocol_features:
                # It can refuse by hanging up only; an answer to something else tells that it did not.
                await frontend.get_protocol_features()
        except Refused as error:
            raise self._too_large() from error
        except Disconnected as error:
            raise LeftAtSize(str(error)) from error

    def _too_large(self) -> UserError:
        size = self.layout.queue_size
        return UserError(
            f"the back-end at {self._path} does not take vrings of {size} entries: use a smaller size, as "
            f"--queue-size {self.facts.smaller_queue_size(size)}"
        )

    async def _begin_ring(self, vcpu: Vcpu, place: RingPlace, fds: list[int]) -> None:
        fields = {
            "desc_gpa": place.desc_gpa,
            "avail_gpa": place.avail_gpa,
            "used_gpa": place.used_gpa,
            "size": self.layout.queue_size,
            "event_idx": self.facts.has(F_RING_EVENT_IDX),
            "indirect": self.facts.has(F_RING_INDIRECT_DESC),
        }
        await vcpu.command("ring", fields, fds)

    def _used_idx(self, place: RingPlace) -> int:
        """The base of a ring: where its used index stands, as QEMU says it; the inflight region tells the rest."""
        start = place.used_gpa + USED_IDX
        with self.ram.view[start : start + 2] as view:
            return int.from_bytes(view, "little")

    def _watch_err(self, index: int, fd: int) -> None:
        def broken() -> None:
            self._forget_err_fds()
            self._fail(ProtocolError(f"the back-end says that vring {index} is broken"))

        self._err_fds.append(fd)
        asyncio.get_running_loop().add_reader(fd, broken)

    def _forget_err_fds(self) -> None:
        for fd in self._err_fds:
            asyncio.get_running_loop().remove_reader(fd)
        close_all(self._err_fds)
        self._err_fds.clear()

    def _fail(self, error: VvupipeError) -> None:
        if not self.failed.done():
            self.failed.set_result(error)

    async def _supervise(self) -> None:
        """Bring the disk back whenever its back-end went."""
        patience: Patience | None = None
        before, came_at = -1, 0.0
        try:
            while True:
                assert self._frontend is not None
                reason = await asyncio.shield(self._frontend.closed)
                self._say(f"{reason}; waiting for it to come back")
                done = sum(vcpu.counters().requests for vcpu in self.vcpus)
                if patience is None or done != before or time.monotonic() - came_at > _SETTLED_S:
                    patience = Patience(self._path, self._timeout_s)
                else:
                    await patience.pause()  # it came, did nothing and left again
                await self._reconnect(patience)
                before, came_at = done, time.monotonic()
                self.reconnects += 1
                self._say("the back-end is back; requests in flight are done again")
        except VvupipeError as error:
            # Exit status 1, whatever it was: the user's command was right when it began.
            self._fail(TransportError(f"the disk is lost: {error}"))

    def _supervisor_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            log.debug("the disk's supervisor failed", exc_info=error)
            self._fail(TransportError(f"the disk is lost: {error}"))

    async def _reconnect(self, patience: Patience) -> None:
        for vcpu in self.vcpus:
            await vcpu.command("pause")
        while True:
            assert self._frontend is not None
            await self._frontend.close()
            self._forget_err_fds()
            await self._connect(patience)
            if await self._start_vrings():
                return
            await patience.pause()

    async def run_jobs(self, jobs: Sequence[tuple[Vcpu, dict[str, Any], list[int]]]) -> None:
        """Start a job on each vCPU and wait for all.

        A job is (vCPU, fields of its `job` command, fds). Raises: ProtocolError when the back-end broke a vring,
        TransportError when it is gone for good, WorkerError when a vCPU died.
        """
        for vcpu, fields, fds in jobs:
            await self._or_lost(vcpu.command("job", fields, fds))
        await self._or_lost(self._all_done([vcpu for vcpu, _, _ in jobs]))
        for vcpu, _, _ in jobs:
            vcpu.check_ring()

    async def _all_done(self, vcpus: Sequence[Vcpu]) -> None:
        async with asyncio.TaskGroup() as group:
            for vcpu in vcpus:
                group.create_task(vcpu.job_done())

    async def _or_lost(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        try:
            waited: set[asyncio.Future[Any]] = {task, self.failed}
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise self.failed.result()
            try:
                task.result()
            except* VvupipeError as group:
                raise _first(group) from None
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})

    async def stop_jobs(self) -> None:
        """Have every job start no more requests. Harmless when none runs."""
        for vcpu in self.vcpus:
            await vcpu.command("stop")

    async def transfer(
        self,
        kind: int,
        *,
        sector: int,
        size_bytes: int,
        chunk_bytes: int,
        data_off: int = 0,
        file: tuple[int, int] | None = None,
    ) -> Counters:
        """Move `size_bytes` (at most what the first vring's data area takes behind `data_off`) on the first vCPU.

        file: (fd, offset) of the host's file at the other end. Returns the job's counters, errors among them; an error
        of the file is raised. Raises: OSError; see run_jobs.
        """
        vcpu = self.vcpus[0]
        place = self.layout.vrings[0]
        chunks = max(1, -(-size_bytes // chunk_bytes))
        fields = {
            "kernel": "transfer",
            "depth": min(chunks, self.depth_max, _TRANSFER_DEPTH),
            "tags_gpa": place.tags_gpa,
            "data_gpa": place.data_gpa + data_off,
            "stride_bytes": 0,
            "length_bytes": 0,
            "job": {
                "kind": kind,
                "first_sector": sector,
                "total_bytes": size_bytes,
                "chunk_bytes": chunk_bytes,
                "chunks": chunks,
                "file_offset": file[1] if file else 0,
            },
        }
        await self.run_jobs([(vcpu, fields, [file[0]] if file else [])])
        counters = vcpu.counters()
        if counters.record["status"] == ERR_FILE:
            code = counters.record["file_errno"]
            raise OSError(code, os.strerror(code) if code else "the file ended too early")
        return counters

    def data(self, data_off: int, size_bytes: int) -> memoryview:
        """Bytes of the first vring's data area."""
        start = self.layout.vrings[0].data_gpa + data_off
        return self.ram.view[start : start + size_bytes]

    async def get_serial(self) -> str:
        """The disk's serial number (GET_ID); empty when it has none."""
        counters = await self.transfer(BLK_T_GET_ID, sector=0, size_bytes=BLK_ID_BYTES, chunk_bytes=BLK_ID_BYTES)
        if counters.record["errors"]:
            return ""
        with self.data(0, BLK_ID_BYTES) as view:
            return printable(bytes(view).split(b"\0")[0].strip())

    async def flush(self) -> None:
        """Everything written is on the disk. Raises: TransportError when the back-end says it is not."""
        if not self.facts.can_flush:
            return
        counters = await self.transfer(BLK_T_FLUSH, sector=0, size_bytes=0, chunk_bytes=512)
        if counters.record["errors"]:
            raise TransportError("the disk failed to flush: what was written may be lost")

    async def _stop_vrings(self) -> None:
        assert self._frontend is not None
        for vcpu in self.vcpus:
            await vcpu.command("pause")
            await self._frontend.get_vring_base(vcpu.index)

    async def close(self) -> None:
        """Stop the vrings, disconnect, end the vCPUs, free the memory."""
        if self._supervisor:
            self._supervisor.cancel()
            await asyncio.wait({self._supervisor})
            # The back-end may be gone or stuck, and the end must not depend on it.
            with contextlib.suppress(VvupipeError, TimeoutError):
                async with asyncio.timeout(_STOP_TIMEOUT_S):
                    await self._stop_vrings()
        if self._frontend:
            await self._frontend.close()
        self._inflight.forget()
        self._forget_err_fds()
        await asyncio.gather(*(vcpu.close() for vcpu in self.vcpus))
        self._control.close()
        self.ram.close()
        os.close(self._ram_fd)


_TRANSFER_DEPTH = 32  # chunks in flight: enough to keep both sides busy


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    inner = group.exceptions[0]
    return _first(inner) if isinstance(inner, BaseExceptionGroup) else inner
