"""What comes with a sibling's messages and stays with the proxy: memory, eventfds, the back-end channel.

The message goes on to the driver, with offsets into BAR 4 where it had offsets into a file (docs/vvu.md).
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Awaitable, Callable

from vvupipe.errors import ProtocolError
from vvupipe.memory.region import MemoryRegion, close_regions
from vvupipe.vfio.user_server import is_eventfd
from vvupipe.vhost_user.messages import Message, Request
from vvupipe.vhost_user.payloads import (
    VRING_INDEX_MASK,
    InflightArea,
    LogArea,
    pack_single_region,
    unpack_single_region,
    unpack_u64,
)
from vvupipe.vhost_user.socket_transport import MessageSocket, SocketConnection
from vvupipe.vvu import layout
from vvupipe.vvu.function import VvuFunction
from vvupipe.vvu.region_table import MemoryPlacer, Piece
from vvupipe.vvu.shared_memory_bar import Plan

_VRING_EVENTS = {Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR}


class ProxyFds:
    """Keeps the fds of the present sibling. caught_up: returns once the driver has dealt with earlier messages."""

    def __init__(
        self, function: VvuFunction, placer: MemoryPlacer | None, caught_up: Callable[[], Awaitable[None]]
    ) -> None:
        self._function = function
        self._placer = placer
        self._caught_up = caught_up
        self.channel: MessageSocket | None = None

    def forget(self) -> None:
        """The sibling is gone."""
        self._function.shared_memory.clear()
        self._function.show_regions([])
        if self._placer:
            self._placer.forget()
        self._function.notifications.forget_sibling()
        self._set_channel(None)

    def _set_channel(self, channel: MessageSocket | None) -> None:
        if self.channel:
            self.channel.shut_down()  # whoever reads it wakes up and closes it
        self.channel = channel

    async def keep(self, connection: SocketConnection, message: Message) -> None:
        """Take over what comes with a message. Raises: ProtocolError when it does not fit the message."""
        match message.request:
            case Request.SET_MEM_TABLE:
                await self._set_table(connection, message)
            case Request.ADD_MEM_REG:
                await self._add_slot(connection, message)
            case Request.REM_MEM_REG:
                entry = unpack_single_region(message)
                self._function.shared_memory.plan_removal((entry.gpa, entry.uva, entry.size_bytes))  # is it there?
            case Request.SET_LOG_BASE:
                log = LogArea.unpack(message)
                offset = await self._set_extra(connection, message, "log", log.size_bytes, log.offset)
                message.payload = dataclasses.replace(log, offset=offset).pack()
            case Request.SET_INFLIGHT_FD:
                area = InflightArea.unpack(message)
                offset = await self._set_extra(connection, message, "inflight", area.size_bytes, area.offset)
                message.payload = dataclasses.replace(area, offset=offset).pack()
            case Request.SET_LOG_FD:
                _check_eventfds(message)
                self._function.notifications.set_log(connection.log_event(message))
            case Request.SET_BACKEND_REQ_FD:
                self._set_channel(connection.back_end_channel(message))
            case request if request in _VRING_EVENTS:
                self._keep_event(connection, message)

    async def after(self, message: Message) -> None:
        """What can go once the driver has dealt with the message."""
        if message.request == Request.REM_MEM_REG:
            await self._caught_up()
            entry = unpack_single_region(message)
            plan = self._function.shared_memory.plan_removal((entry.gpa, entry.uva, entry.size_bytes))
            await self._carry_out(plan)

    async def _set_table(self, connection: SocketConnection, message: Message) -> None:
        if self._function.shared_memory.areas:
            await self._caught_up()  # the driver may still be asking for the areas of the former table
        regions = await connection.memory_regions(message)
        try:
            await self._carry_out(self._function.shared_memory.plan_table(regions))
            _handed_over(regions)
        finally:
            close_regions(regions)

    async def _add_slot(self, connection: SocketConnection, message: Message) -> None:
        entry = unpack_single_region(message)
        if self._function.shared_memory.slots >= layout.MEM_SLOTS_MAX:
            raise ProtocolError(f"more than {layout.MEM_SLOTS_MAX} memory slots")
        regions = await connection.added_region(message)
        try:
            plan, offset = self._function.shared_memory.plan_slot(regions[0])
            await self._carry_out(plan)
            _handed_over(regions)
        finally:
            close_regions(regions)
        message.payload = pack_single_region(dataclasses.replace(entry, mmap_offset=offset))

    async def _set_extra(
        self, connection: SocketConnection, message: Message, name: str, size_bytes: int, file_offset: int
    ) -> int:
        """Its offset in BAR 4."""
        area = await connection.area(message, size_bytes, file_offset)
        try:
            plan, offset = self._function.shared_memory.plan_extra(name, area.fd, area.size_bytes, area.offset)
            await self._carry_out(plan)
        except BaseException:
            os.close(area.fd)
            raise
        return offset

    async def _carry_out(self, plan: Plan) -> None:
        pieces = await self._placer.place(plan.areas) if self._placer else _in_bar(plan)
        self._function.shared_memory.commit(plan)
        self._function.show_regions(pieces)

    def _keep_event(self, connection: SocketConnection, message: Message) -> None:
        notifications = self._function.notifications
        index = unpack_u64(message) & VRING_INDEX_MASK
        if index >= notifications.count:
            return  # the back-end's answer tells that there is no such vring
        _check_eventfds(message)
        if message.request == Request.SET_VRING_KICK:
            notifications.set_kick(index, connection.kick(message))
        elif message.request == Request.SET_VRING_CALL:
            notifications.set_call(index, connection.call(message))
        else:
            notifications.set_err(index, connection.err(message))


def _check_eventfds(message: Message) -> None:
    if any(not is_eventfd(fd) for fd in message.fds):
        raise ProtocolError(f"{message.name} with a file descriptor that is no eventfd")
    for fd in message.fds:
        os.set_blocking(fd, False)


def _handed_over(regions: list[MemoryRegion]) -> None:
    for region in regions:
        region.fd = -1


def _in_bar(plan: Plan) -> list[Piece]:
    """For information: a driver that maps the BAR asks for its areas."""
    areas = itertools.islice(plan.areas, layout.REGION_TABLE_MAX)
    return [Piece(area.offset, area.size_bytes) for area in areas]
