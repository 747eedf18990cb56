"""A session's vrings: what the front-end tells of them, when they run, inflight tracking, in-band notifications."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable

from kernels.inflight_layout import part_bytes
from kernels.virtio_layout import (
    F_ACCESS_PLATFORM,
    F_IN_ORDER,
    F_RING_EVENT_IDX,
    F_RING_INDIRECT_DESC,
    F_RING_PACKED,
    PACKED_WRAP,
)
from vvupipe.errors import Disconnected, ProtocolError, TransportError, UserError, WorkerError
from vvupipe.fd_socket import wait_fd
from vvupipe.memory.doorbell import Doorbell
from vvupipe.vhost_user.back_end_channel import BackendChannel
from vvupipe.vhost_user.device import Device
from vvupipe.vhost_user.messages import BackendRequest, Message
from vvupipe.vhost_user.payloads import (
    VRING_F_LOG,
    VRING_INDEX_MASK,
    InflightArea,
    VringAddress,
    VringState,
    unpack_u64,
)
from vvupipe.vhost_user.transport import Connection, FileArea
from vvupipe.vhost_user.vring import Vring
from vvupipe.workers.vring_setup import VringSetup

log = logging.getLogger(__name__)

_INFLIGHT_MAX = 256 << 20
_INFLIGHT_ALIGN = 8  # its words are stored whole, which takes alignment


class SessionVrings:
    """Every vring of a session ("Ring states" in docs/interop/vhost-user.rst)."""

    def __init__(self, connection: Connection, device: Device, has_memory: Callable[[], bool]) -> None:
        self._connection = connection
        self._device = device
        self._has_memory = has_memory
        self._vrings = [Vring(index) for index in range(device.num_queues)]
        self._inflight: tuple[FileArea, InflightArea] | None = None
        self._in_band: dict[tuple[int, str], asyncio.Task[None]] = {}
        self.features = 0
        self.in_band = False  #: INBAND_NOTIFICATIONS was negotiated
        self.channel: Callable[[], BackendChannel | None] = lambda: None

    @property
    def running(self) -> bool:
        """Whether any vring runs."""
        return any(vring.running for vring in self._vrings)

    @property
    def packed(self) -> bool:
        """Whether packed rings were negotiated."""
        return bool(self.features & F_RING_PACKED)

    async def stop_all(self) -> None:
        """Stop what runs."""
        for vring in self._vrings:
            await self._stop(vring)

    async def reset(self) -> None:
        """Stop and disable every vring. GET_VRING_BASE tells where it was until it gets a base or starts again."""
        await self.stop_all()
        for vring in self._vrings:
            if vring.last_avail_idx is not None:
                vring.stopped_at = self._base_state(vring)
            vring.reset()
        self._forget_inflight()

    async def close(self) -> None:
        """Stop everything and close the eventfds."""
        try:
            await self.stop_all()
        finally:
            for vring in self._vrings:
                vring.close()
            for task in self._in_band.values():
                task.cancel()
            await asyncio.gather(*self._in_band.values(), return_exceptions=True)
            self._forget_inflight()
            self._device.pool.forget_undone()

    def enable_all(self) -> None:
        """Without protocol features a ring starts enabled."""
        for vring in self._vrings:
            vring.enabled = True

    async def start_complete(self) -> None:
        """Start what can run by now."""
        for vring in self._vrings:
            await self._start_if_complete(vring)

    def _vring(self, index: int) -> Vring:
        if index >= len(self._vrings):
            raise ProtocolError(f"vring {index} does not exist, there are {len(self._vrings)}")
        return self._vrings[index]

    def _stopped_vring(self, index: int) -> Vring:
        vring = self._vring(index)
        if vring.running:
            raise ProtocolError(f"vring {index} is running; stop it first")
        return vring

    # Requests.

    async def set_num(self, message: Message) -> None:
        """SET_VRING_NUM. Whether the size suits the layout is looked at when the ring starts."""
        state = VringState.unpack(message)
        size = state.num
        limit = self._device.queue_size_max
        if not 0 < size <= limit or (size & (size - 1) and not self.packed):
            raise ProtocolError(f"vring size {size}: a power of two up to {limit} is possible (--queue-size)")
        self._stopped_vring(state.index).size = size

    async def set_addr(self, message: Message) -> None:
        """SET_VRING_ADDR; while the ring runs only logging can change."""
        address = VringAddress.unpack(message)
        vring = self._vring(address.index)
        parts = (address.descriptor_uva, address.available_uva, address.used_uva)
        if vring.running and parts != vring.addresses:
            raise ProtocolError(f"vring {vring.index} cannot move while it runs")
        vring.addresses = parts
        vring.flags = address.flags
        vring.log_gpa = address.log_gpa
        if vring.running:
            on = bool(vring.flags & VRING_F_LOG)
            await self._device.pool.set_log_used(vring.index, on=on, gpa=vring.log_gpa)
        await self._start_if_complete(vring)

    async def set_base(self, message: Message) -> None:
        """SET_VRING_BASE. A packed ring's used index, in the upper half, equals the other: nothing is under way."""
        state = VringState.unpack(message)
        vring = self._stopped_vring(state.index)
        vring.last_avail_idx = state.num & 0xFFFF
        vring.stopped_at = None

    async def get_base(self, message: Message) -> bytes:
        """GET_VRING_BASE: stop the ring."""
        vring = self._vring(VringState.unpack(message).index)
        await self._stop(vring)
        vring.drop_kick()
        if not self.running:
            # A firmware's driver ran before the guest switched its IOMMU on: nobody tells that its translations end.
            await self._device.pool.forget_translations()
        # QEMU before 8.1 resets the status first and asks then; a paused VM goes on from the answer.
        num = self._base_state(vring) if vring.stopped_at is None else vring.stopped_at
        return VringState(vring.index, num).pack()

    async def set_kick(self, message: Message) -> None:
        """SET_VRING_KICK."""
        vring = self._vring(unpack_u64(message) & VRING_INDEX_MASK)
        kick = self._connection.kick(message)  # what is refused leaves the ring as it is
        try:
            await self._stop(vring)
        except BaseException:
            if kick is not None:
                os.close(kick)
            raise
        vring.set_kick(kick)
        await self._start_if_complete(vring)

    async def kick_in_band(self, message: Message) -> None:
        """VRING_KICK: start the ring if it does not run, and have it looked at."""
        if not self.in_band:
            raise ProtocolError("VRING_KICK without INBAND_NOTIFICATIONS")
        vring = self._vring(VringState.unpack(message).index)
        if not vring.kicked:
            vring.set_kick(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
            await self._start_if_complete(vring)
        if vring.kick_fd >= 0:
            Doorbell(vring.kick_fd).ring()

    async def set_call(self, message: Message) -> None:
        """SET_VRING_CALL."""
        vring = self._vring(unpack_u64(message) & VRING_INDEX_MASK)
        vring.call_set = True
        await self._set_doorbell(vring, "call", self._connection.call(message))

    async def set_err(self, message: Message) -> None:
        """SET_VRING_ERR."""
        vring = self._vring(unpack_u64(message) & VRING_INDEX_MASK)
        await self._set_doorbell(vring, "err", self._connection.err(message))

    async def _set_doorbell(self, vring: Vring, which: str, doorbell: Doorbell | None) -> None:
        try:
            copy = _copy(doorbell) if vring.running else None
        except OSError:
            if doorbell:
                doorbell.close()
            raise
        if task := self._in_band.pop((vring.index, which), None):
            task.cancel()
        vring.set_doorbell(which, doorbell)
        if vring.running:
            await self._device.pool.replace_doorbell(vring.index, which, copy)

    async def set_enable(self, message: Message) -> None:
        """SET_VRING_ENABLE."""
        state = VringState.unpack(message)
        vring = self._vring(state.index)
        vring.enabled = bool(state.num)
        if vring.enabled:
            await self._start_if_complete(vring)
        else:
            await self._stop(vring)

    # Inflight tracking.

    async def get_inflight(self, message: Message) -> Message:
        """GET_INFLIGHT_FD: the whole reply, with an area for as many vrings of that size as are asked for."""
        wanted = InflightArea.unpack(message)
        limit = self._device.queue_size_max
        if not 0 < wanted.num_queues <= len(self._vrings) or not 0 < wanted.queue_size <= limit:
            raise ProtocolError(
                f"an inflight region for {wanted.num_queues} vrings of {wanted.queue_size} entries: up to "
                f"{len(self._vrings)} (--num-queues) of up to {limit} (--queue-size) are possible"
            )
        size = wanted.num_queues * part_bytes(wanted.queue_size, packed=self.packed)
        reply = message.reply(InflightArea(size, 0, wanted.num_queues, wanted.queue_size).pack())
        self._connection.attach_area(reply, size)
        return reply

    async def set_inflight(self, message: Message) -> None:
        """SET_INFLIGHT_FD."""
        told = InflightArea.unpack(message)
        if self.running:
            raise ProtocolError("the inflight region cannot change while vrings run")
        needed = told.num_queues * part_bytes(told.queue_size, packed=self.packed)
        if told.size_bytes < needed or told.size_bytes > _INFLIGHT_MAX:
            raise ProtocolError(f"an inflight region of {told.size_bytes} bytes, {needed} are needed")
        if told.offset % _INFLIGHT_ALIGN:
            raise ProtocolError(f"an inflight region at {told.offset}: its words would not be aligned")
        area = await self._connection.area(message, told.size_bytes, told.offset)
        self._forget_inflight()
        self._inflight = area, told
        await self.start_complete()

    def _forget_inflight(self) -> None:
        if self._inflight:
            os.close(self._inflight[0].fd)
            self._inflight = None

    def _part_of_inflight(self, vring: Vring) -> tuple[int, int, int]:
        """(fd of its own, offset, bytes) of the vring's part; (-1, 0, 0) when it has none."""
        if not self._inflight:
            return -1, 0, 0
        area, told = self._inflight
        if vring.index >= told.num_queues or vring.size > told.queue_size:
            raise ProtocolError(f"vring {vring.index} of {vring.size} entries has no part of the inflight region")
        size = part_bytes(told.queue_size, packed=self.packed)
        if (vring.index + 1) * size > told.size_bytes:
            raise ProtocolError(f"an inflight region of {told.size_bytes} bytes, made for another layout of rings")
        return os.dup(area.fd), area.offset + vring.index * size, size

    # Start and stop.

    def _base(self, vring: Vring) -> int:
        if vring.last_avail_idx is None:
            return PACKED_WRAP if self.packed else 0
        return vring.last_avail_idx

    def _base_state(self, vring: Vring) -> int:
        """As SET_VRING_BASE and GET_VRING_BASE put it: a packed ring's used index stands in the upper half."""
        base = self._base(vring)
        return base | base << 16 if self.packed else base

    async def _start_if_complete(self, vring: Vring) -> None:
        if vring.running or not vring.complete or not self._has_memory():
            return
        self._fill_in_band(vring)
        try:
            answer = await self._device.pool.start_vring(self._setup(vring))
        except (WorkerError, UserError, OSError):
            if vring.err:
                with contextlib.suppress(OSError):  # it is the front-end's, and may be anything
                    vring.err.ring()
            raise
        base = self._base(vring)
        vring.running = True
        vring.stopped_at = None
        if answer.again:
            log.warning("vring %d: %d requests that were under way are done again", vring.index, answer.again)
        elif answer.last_avail_idx != base:
            log.warning(
                "vring %d: base %d, but its memory says %d; what was left undone is done again",
                vring.index,
                base,
                answer.last_avail_idx,
            )
        log.info("vring %d started at %d, %d entries", vring.index, answer.last_avail_idx, vring.size)

    def _setup(self, vring: Vring) -> VringSetup:
        assert vring.addresses is not None
        desc_uva, avail_uva, used_uva = vring.addresses
        setup = VringSetup(
            vring.index,
            vring.size,
            desc_uva,
            avail_uva,
            used_uva,
            event_idx=bool(self.features & F_RING_EVENT_IDX),
            indirect=bool(self.features & F_RING_INDIRECT_DESC),
            write_through=self._device.write_through(self.features),
            packed=self.packed,
            in_order=bool(self.features & F_IN_ORDER),
            iotlb=bool(self.features & F_ACCESS_PLATFORM),
            base=self._base(vring),
            log_used=bool(vring.flags & VRING_F_LOG),
            log_gpa=vring.log_gpa,
        )
        try:
            setup.inflight_fd, setup.inflight_offset, setup.inflight_bytes = self._part_of_inflight(vring)
            setup.kick_fd = os.dup(vring.kick_fd) if vring.kick_fd >= 0 else -1
            setup.call = _copy(vring.call)
            setup.err = _copy(vring.err)
        except BaseException:
            setup.close()
            raise
        return setup

    async def _stop(self, vring: Vring) -> None:
        if vring.running:
            vring.last_avail_idx = await self._device.pool.stop_vring(vring.index)
            vring.running = False
            log.info("vring %d stopped at %d", vring.index, vring.last_avail_idx)

    # In-band notifications: an eventfd of our own, and a task that makes messages of it.

    def _fill_in_band(self, vring: Vring) -> None:
        if not self.in_band:
            return
        if vring.call is None and not vring.call_set:
            self._ring_in_band(vring, "call", BackendRequest.VRING_CALL)
        if vring.err is None:
            self._ring_in_band(vring, "err", BackendRequest.VRING_ERR)

    def _ring_in_band(self, vring: Vring, which: str, kind: BackendRequest) -> None:
        doorbell = Doorbell(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
        try:
            watched = os.dup(doorbell.fd)
        except OSError:
            doorbell.close()
            raise
        vring.set_doorbell(which, doorbell)
        task = asyncio.create_task(self._relay(watched, vring.index, kind))
        # Not in the task: one that is cancelled before its first step does nothing.
        task.add_done_callback(lambda _: os.close(watched))
        self._in_band[vring.index, which] = task

    async def _relay(self, fd: int, index: int, kind: BackendRequest) -> None:
        try:
            while True:
                await wait_fd(fd)
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(fd)
                channel = self.channel()
                if channel is None:
                    log.warning("vring %d has news, and there is no back-end channel to tell it on", index)
                    continue
                try:
                    await channel.request(kind, VringState(index, 0).pack())
                except Disconnected:
                    if self.channel() is channel:
                        raise
                    os.eventfd_write(fd, 1)  # there is another one, on which it is told again
        except (Disconnected, ProtocolError, TransportError) as error:
            log.warning("in-band notifications of vring %d end: %s", index, error)


def _copy(doorbell: Doorbell | None) -> Doorbell | None:
    """A doorbell with an fd of its own. Raises: OSError."""
    return Doorbell(os.dup(doorbell.fd)) if doorbell else None
