"""Requests of the back-end to the front-end, on the channel that SET_BACKEND_REQ_FD brings."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque

from vvupipe.errors import Disconnected, ProtocolError, TransportError
from vvupipe.vhost_user.messages import FLAG_NEED_REPLY, VERSION, BackendRequest, Message
from vvupipe.vhost_user.payloads import unpack_u64
from vvupipe.vhost_user.transport import MessageChannel

log = logging.getLogger(__name__)

_REPLY_TIMEOUT_S = 60.0


class BackendChannel:
    """Sends requests; waits for their replies where the front-end gives any (REPLY_ACK). Owns the channel."""

    def __init__(self, channel: MessageChannel, *, acks: bool) -> None:
        self._channel = channel
        self._acks = acks
        self._waiting: deque[tuple[int, asyncio.Future[int]]] = deque()
        self._sending = asyncio.Lock()
        self._reader = asyncio.create_task(self._read())

    async def request(self, kind: BackendRequest, payload: bytes = b"") -> int | None:
        """Send a request. The front-end's code (0: done), None when it does not say.

        Raises: Disconnected when the channel is gone, ProtocolError when no reply comes, TransportError.
        """
        flags = VERSION | FLAG_NEED_REPLY if self._acks else VERSION
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        async with self._sending:
            if self._reader.done():
                raise Disconnected("the back-end channel is closed")
            if self._acks:
                self._waiting.append((kind, answer))
            log.debug("-> back-end channel: %s, %d bytes", kind.name, len(payload))
            try:
                await self._channel.send(Message(kind, payload, flags))
            except OSError as error:  # it is the front-end's, and may be a socket of any kind
                raise Disconnected(f"nothing can be sent on the back-end channel: {error.strerror}") from error
        if not self._acks:
            return None
        try:
            async with asyncio.timeout(_REPLY_TIMEOUT_S):
                return await answer
        except TimeoutError:
            raise ProtocolError(f"the front-end did not answer {kind.name} on the back-end channel") from None

    async def _read(self) -> None:
        reason = "the front-end closed the back-end channel"
        try:
            while (message := await self._channel.receive()) is not None:
                message.close_fds()
                if not message.is_reply or not self._waiting or self._waiting[0][0] != message.request:
                    log.warning("a message %d on the back-end channel that nobody asked for", message.request)
                    continue
                code = unpack_u64(message)
                _, answer = self._waiting.popleft()
                if not answer.done():
                    answer.set_result(code)
        except (ProtocolError, TransportError, OSError) as error:
            reason = str(error)
            log.warning("back-end channel: %s", error)
        finally:
            for _, answer in self._waiting:
                if not answer.done():
                    answer.set_exception(Disconnected(reason))
                    answer.exception()  # whoever waited may be gone as well
            self._waiting.clear()

    async def close(self) -> None:
        """Close the channel; who waits for a reply sees Disconnected."""
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader
        self._channel.close()
