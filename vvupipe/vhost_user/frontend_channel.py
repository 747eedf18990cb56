"""The front-end's end of the back-end channel: requests of the back-end, and the answers that they get.

Specification: QEMU docs/interop/vhost-user.rst, "Back-end message types", REPLY_ACK.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from vvupipe.errors import Disconnected, ProtocolError, VvupipeError
from vvupipe.vhost_user.messages import BackendRequest, Message
from vvupipe.vhost_user.payloads import IotlbEntry, IotlbType, VringState, pack_u64
from vvupipe.vhost_user.transport import MessageChannel

log = logging.getLogger(__name__)

_DONE = 0
_FAILED = 1


@dataclass(slots=True)
class ChannelHandlers:
    """What a front-end does about each request of its back-end; None: it is answered that it failed.

    A handler that raises a VvupipeError failed as well. Requests are handled one after the other, as they come.
    """

    iotlb_miss: Callable[[int, int], Awaitable[None]] | None = None  #: of (iova, access that is wanted)
    iotlb_access_fail: Callable[[int, int], Awaitable[None]] | None = None  #: the same
    config_change: Callable[[], Awaitable[None]] | None = None
    vring_call: Callable[[int], Awaitable[None]] | None = None  #: of the vring's index
    vring_err: Callable[[int], Awaitable[None]] | None = None


class FrontendChannel:
    """Takes the back-end's requests until it closes the channel, which it owns."""

    def __init__(self, channel: MessageChannel, handlers: ChannelHandlers, *, acks: bool) -> None:
        self._channel = channel
        self._handlers = handlers
        self._acks = acks
        #: Done when the channel is at its end: the reason, for a person.
        self.closed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._serve())

    async def close(self) -> None:
        """Close the channel. Harmless when called again."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._channel.close()
        self._end("closed by us")

    def _end(self, reason: str) -> None:
        if not self.closed.done():
            self.closed.set_result(reason)

    async def _serve(self) -> None:
        reason = "the back-end closed its channel"
        try:
            while (message := await self._channel.receive()) is not None:
                await self._answer(message)
        except (ProtocolError, OSError) as error:
            reason = str(error)
            if not isinstance(error, Disconnected):
                log.warning("back-end channel: %s", error)
        self._channel.close()
        self._end(reason)

    async def _answer(self, message: Message) -> None:
        """Handle a request; "REPLY_ACK": whoever asks is told how it went, whoever does not ask expects nothing."""
        if message.is_reply:
            message.close_fds()
            raise ProtocolError(f"a reply to request {message.request}, which nobody made")
        try:
            log.debug("<- back-end channel: request %d, %d bytes", message.request, len(message.payload))
            await self._handle(message)
            code = _DONE
        except VvupipeError as error:
            log.warning("request %d on the back-end channel: %s", message.request, error)
            code = _FAILED
        finally:
            message.close_fds()
        if self._acks and message.need_reply:
            await self._channel.send(message.reply(pack_u64(code)))

    async def _handle(self, message: Message) -> None:
        """Raises: ProtocolError when it makes no sense or nobody handles it, and what a handler raises."""
        if message.fds:
            raise ProtocolError(f"{len(message.fds)} file descriptors, which nobody needs")
        handlers = self._handlers
        if message.request == BackendRequest.IOTLB_MSG:
            entry = IotlbEntry.unpack(message)
            by_kind: dict[int, Callable[[int, int], Awaitable[None]] | None] = {
                IotlbType.MISS: handlers.iotlb_miss,
                IotlbType.ACCESS_FAIL: handlers.iotlb_access_fail,
            }
            about_access = by_kind.get(entry.kind)
            if about_access:
                return await about_access(entry.iova, entry.permissions)
        elif message.request == BackendRequest.CONFIG_CHANGE_MSG:
            if message.payload:
                raise ProtocolError(f"CONFIG_CHANGE_MSG with {len(message.payload)} bytes")
            if handlers.config_change:
                return await handlers.config_change()
        elif message.request in {BackendRequest.VRING_CALL, BackendRequest.VRING_ERR}:
            call = message.request == BackendRequest.VRING_CALL
            about_vring = handlers.vring_call if call else handlers.vring_err
            index = VringState.unpack(message).index
            if about_vring:
                return await about_vring(index)
        raise ProtocolError("nobody handles it")
