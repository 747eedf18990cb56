"""A front-end's requests about vrings: set up, start, stop, inflight tracking."""

from __future__ import annotations

import os
from dataclasses import dataclass

from kernels.virtio_layout import F_RING_PACKED
from vvupipe.errors import ProtocolError, Refused
from vvupipe.vhost_user.frontend_connection import FrontendConnection
from vvupipe.vhost_user.messages import F_PROTOCOL_FEATURES, Request
from vvupipe.vhost_user.payloads import (
    VRING_F_LOG,
    VRING_INDEX_MASK,
    VRING_NO_FD,
    InflightArea,
    VringAddress,
    VringState,
    pack_u64,
)
from vvupipe.vhost_user.socket_transport import check_backing

_WRAP = 1 << 15


@dataclass(frozen=True, slots=True)
class PackedBase:
    """The base of a packed ring: both positions with their wrap counters (SET_VRING_BASE, GET_VRING_BASE)."""

    avail_slot: int
    avail_wrap: bool
    used_slot: int
    used_wrap: bool

    def pack(self) -> int:
        """The 32-bit number of a vring state description."""
        avail, used = self.avail_slot | self.avail_wrap << 15, self.used_slot | self.used_wrap << 15
        return avail | used << 16

    @classmethod
    def unpack(cls, base: int) -> PackedBase:
        """From the 32-bit number."""
        avail, used = base & 0xFFFF, base >> 16
        return cls(avail & ~_WRAP, bool(avail & _WRAP), used & ~_WRAP, bool(used & _WRAP))


@dataclass(slots=True)
class InflightRegion:
    """Memory in which a back-end notes what is under way, to outlive it. The holder owns `fd`."""

    area: InflightArea
    fd: int

    def close(self) -> None:
        """Close the fd. Harmless when called again."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class FrontendVrings(FrontendConnection):
    """Requests about vrings ("Ring states"). Errors: see FrontendConnection. fds that are sent stay the caller's."""

    async def set_vring_num(self, index: int, size: int) -> None:
        """SET_VRING_NUM: entries of the vring."""
        await self._tell(Request.SET_VRING_NUM, VringState(index, size).pack())

    async def set_vring_addr(
        self,
        index: int,
        *,
        descriptor_uva: int,
        available_uva: int,
        used_uva: int,
        log_gpa: int | None = None,
    ) -> None:
        """SET_VRING_ADDR: where the vring is, in the addresses of the memory table's third column.

        log_gpa: guest-physical address of the used ring, if writes to it are to be logged (VHOST_VRING_F_LOG).
        """
        flags = 0 if log_gpa is None else VRING_F_LOG
        address = VringAddress(index, flags, descriptor_uva, used_uva, available_uva, log_gpa or 0)
        await self._tell(Request.SET_VRING_ADDR, address.pack())

    async def set_vring_base(self, index: int, base: int) -> None:
        """SET_VRING_BASE: the available index to start at; of a packed ring, see PackedBase."""
        await self._tell(Request.SET_VRING_BASE, VringState(index, base).pack())

    async def get_vring_base(self, index: int) -> int:
        """GET_VRING_BASE: stop the vring; the available index at which it stopped; of a packed ring, see PackedBase."""
        state = VringState.unpack(await self._ask(Request.GET_VRING_BASE, VringState(index, 0).pack()))
        if state.index != index:
            raise ProtocolError(f"GET_VRING_BASE of vring {index} was answered for vring {state.index}")
        if not self.taken_features & F_RING_PACKED and state.num > 0xFFFF:
            raise ProtocolError(f"GET_VRING_BASE of a split vring was answered with {state.num:#x}")
        return state.num

    async def set_vring_kick(self, index: int, fd: int | None) -> None:
        """SET_VRING_KICK: the eventfd that we write when there is work; None has the back-end poll."""
        await self._set_vring_file(Request.SET_VRING_KICK, index, fd)

    async def set_vring_call(self, index: int, fd: int | None) -> None:
        """SET_VRING_CALL: the eventfd that the back-end writes when work is done; None: we poll."""
        await self._set_vring_file(Request.SET_VRING_CALL, index, fd)

    async def set_vring_err(self, index: int, fd: int | None) -> None:
        """SET_VRING_ERR: the eventfd that the back-end writes when the vring is broken; None: we do not ask."""
        await self._set_vring_file(Request.SET_VRING_ERR, index, fd)

    async def _set_vring_file(self, request: Request, index: int, fd: int | None) -> None:
        if index & ~VRING_INDEX_MASK:
            raise ValueError(f"{request.name} has room for vrings up to {VRING_INDEX_MASK}, not for {index}")
        if fd is None:
            await self._tell(request, pack_u64(index | VRING_NO_FD))
        else:
            await self._tell(request, pack_u64(index), [fd])

    async def set_vring_enable(self, index: int, enable: bool) -> None:
        """SET_VRING_ENABLE. Raises: NotNegotiated without the protocol feature bit: all vrings are enabled then."""
        self.needs_feature(Request.SET_VRING_ENABLE, F_PROTOCOL_FEATURES, "VHOST_USER_F_PROTOCOL_FEATURES")
        await self._tell(Request.SET_VRING_ENABLE, VringState(index, int(enable)).pack())

    async def vring_kick(self, index: int) -> None:
        """VRING_KICK: there is work (in-band notifications)."""
        await self._tell(Request.VRING_KICK, VringState(index, 0).pack())

    async def get_inflight(self, num_queues: int, queue_size: int) -> InflightRegion:
        """GET_INFLIGHT_FD: a new region for `num_queues` vrings of `queue_size` entries. The caller owns it.

        Raises: Refused when the back-end gives none.
        """
        request = InflightArea(0, 0, num_queues, queue_size).pack()
        answer = await self._ask(Request.GET_INFLIGHT_FD, request, brings_fd=True)
        try:
            area = InflightArea.unpack(answer)
            if not area.size_bytes:
                raise Refused("the back-end gave no inflight region")
            if (area.num_queues, area.queue_size) != (num_queues, queue_size):
                raise ProtocolError(f"an inflight region for {area.num_queues} vrings of {area.queue_size} entries")
            fd = answer.take_fd()
        except BaseException:
            answer.close_fds()
            raise
        region = InflightRegion(area, fd)
        try:
            check_backing(fd, area.offset + area.size_bytes)
        except ProtocolError:
            region.close()
            raise
        return region

    async def set_inflight(self, region: InflightRegion) -> None:
        """SET_INFLIGHT_FD: a new region, or the one that a former back-end left."""
        await self._tell(Request.SET_INFLIGHT_FD, region.area.pack(), [region.fd])
