"""A front-end's connection: requests go out one at a time, each answer is taken to the request that it is for.

Specification: QEMU docs/interop/vhost-user.rst, "Communication" and REPLY_ACK. A task reads the socket all the time, so
a disconnect is noticed when it happens and not at the next request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Sequence

from vvupipe.errors import Disconnected, NotNegotiated, ProtocolError, Refused
from vvupipe.vhost_user.messages import (
    ANSWERED,
    F_PROTOCOL_FEATURES,
    FLAG_NEED_REPLY,
    IN_BAND_NEEDS,
    NEEDED_FEATURE,
    VERSION,
    Message,
    ProtocolFeature,
    Request,
)
from vvupipe.vhost_user.payloads import pack_u64, unpack_u64
from vvupipe.vhost_user.socket_transport import MessageSocket

__all__ = ["FrontendConnection"]

log = logging.getLogger(__name__)

_ANSWER_TIMEOUT_S = 60.0  # a back-end may finish a slow request before it gives an answer


class FrontendConnection:
    """One connection to a back-end, over a connected UNIX socket that it owns.

    Requests may come from several tasks; each waits for its turn and its answer. All raise

    - NotNegotiated before anything is sent, when the feature that the request needs was not negotiated;
    - Refused when the back-end answers that it failed;
    - Disconnected when the back-end goes;
    - ProtocolError when it answers what it must not, or nothing for `answer_timeout_s`. This ends the connection
      wherever a later answer could be mistaken.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = MessageSocket(sock)
        self._turn = asyncio.Lock()
        self._answer: asyncio.Future[Message] | None = None
        self._error = ProtocolError("")
        self.features = 0  #: what the back-end offers
        self.taken_features = 0  #: what SET_FEATURES told
        self.offered_protocol_features = ProtocolFeature(0)
        self.protocol_features = ProtocolFeature(0)  #: what SET_PROTOCOL_FEATURES told
        self.answer_timeout_s = _ANSWER_TIMEOUT_S
        #: Done when the back-end is gone or broke the protocol: the reason, for a person.
        self.closed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._reader = asyncio.create_task(self._read())

    async def close(self) -> None:
        """Disconnect. Harmless when called again."""
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader
        self._end(Disconnected("closed by us"))
        self._socket.close()

    async def send_raw(self, message: Message, *, answered: bool) -> Message | None:
        """Send any message as it is, whatever was negotiated: for tests of how a back-end takes it.

        `message.fds` stay the caller's. With `answered`, the next message that comes is the result, whatever it is;
        its fds are the caller's. Raises: Disconnected, ProtocolError when no answer comes.
        """
        async with self._turn:
            return await self._exchange(message, answered=answered, timeout_s=self.answer_timeout_s)

    def needs(self, request: Request) -> None:
        """Raises: NotNegotiated when `request` needs what was not negotiated."""
        needed = NEEDED_FEATURE.get(request)
        if needed is not None and needed not in self.protocol_features:
            offered = (
                "which the back-end offers" if needed in self.offered_protocol_features else "which is not offered"
            )
            raise NotNegotiated(f"{request.name} needs the protocol feature {needed.name}, {offered}: not negotiated")

    def needs_feature(self, request: Request, feature: int, name: str) -> None:
        """Raises: NotNegotiated when the feature bits that SET_FEATURES told lack `feature`."""
        if not self.taken_features & feature:
            raise NotNegotiated(f"{request.name} needs the feature {name}: not negotiated")

    async def _ask(
        self,
        request: Request,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        brings_fd: bool = False,
    ) -> Message:
        """Send a request that has an answer of its own; its fds (with `brings_fd`, at most one) are the caller's."""
        self.needs(request)
        return await self._request(
            Message(request, payload, VERSION, list(fds)), brings_fd=brings_fd, timeout_s=self.answer_timeout_s
        )

    async def _ask_u64(self, request: Request, payload: bytes = b"") -> int:
        return unpack_u64(await self._ask(request, payload))

    async def _tell(self, request: Request, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send a request that has no answer of its own; with REPLY_ACK its acknowledgement is awaited.

        Raises: Refused, and see the class.
        """
        assert request not in ANSWERED
        self.needs(request)
        message = Message(request, payload, VERSION, list(fds))
        if ProtocolFeature.REPLY_ACK not in self.protocol_features:
            async with self._turn:
                await self._exchange(message, answered=False, timeout_s=None)
            return
        message.flags |= FLAG_NEED_REPLY
        code = unpack_u64(await self._request(message, timeout_s=self.answer_timeout_s))
        if code:
            raise Refused(f"the back-end refused {request.name} (code {code:#x})")

    async def _request(self, message: Message, *, timeout_s: float | None, brings_fd: bool = False) -> Message:
        """Send a message and await the answer to it."""
        async with self._turn:
            answer = await self._exchange(message, answered=True, timeout_s=timeout_s)
        assert answer is not None
        wrong = ""
        if answer.request != message.request or not answer.is_reply:
            wrong = f"the back-end answered {message.name} with {answer.name}"
        elif len(answer.fds) > int(brings_fd):
            wrong = f"the back-end answered {message.name} with {len(answer.fds)} file descriptors"
        if wrong:
            answer.close_fds()
            self._socket.shut_down()
            raise ProtocolError(wrong)
        return answer

    async def _exchange(self, message: Message, *, answered: bool, timeout_s: float | None) -> Message | None:
        """Send a message, and await the next one if there is to be an answer. The turn is the caller's."""
        self._check_open()
        log.debug("-> %s, %d bytes", message.name, len(message.payload))
        if not answered:
            await self._send(message)
            return None
        waiting: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._answer = waiting
        try:
            await self._send(message)
            async with asyncio.timeout(timeout_s):
                return await waiting
        except TimeoutError:
            # A late answer could be taken for that of the next request: this connection is of no more use.
            self._socket.shut_down()
            raise ProtocolError(f"the back-end did not answer {message.name} within {timeout_s:g} s") from None
        except asyncio.CancelledError:
            self._socket.shut_down()  # for the same reason
            if waiting.done() and not waiting.cancelled() and not waiting.exception():
                waiting.result().close_fds()
            raise
        finally:
            self._answer = None

    async def _send(self, message: Message) -> None:
        try:
            await self._socket.send(message)
        except asyncio.CancelledError:
            self._socket.shut_down()  # a message that broke off is followed by none
            raise

    def _check_open(self) -> None:
        if self.closed.done():
            raise type(self._error)(str(self._error))

    async def _read(self) -> None:
        try:
            while (message := await self._socket.receive()) is not None:
                if self._answer is None or self._answer.done():
                    message.close_fds()
                    raise ProtocolError(f"the back-end sent {message.name}, which nobody asked for")
                self._answer.set_result(message)
            self._end(Disconnected("the back-end closed the connection"))
        except ProtocolError as error:
            self._end(error)
            self._socket.shut_down()
        except OSError as error:
            self._end(Disconnected(str(error)))
            self._socket.shut_down()

    def _end(self, error: ProtocolError) -> None:
        if not self.closed.done():
            self._error = error
            self.closed.set_result(str(error))
        if self._answer and not self._answer.done():
            self._answer.set_exception(error)

    # Negotiation.

    async def set_owner(self) -> None:
        """SET_OWNER."""
        await self._tell(Request.SET_OWNER)

    async def reset_owner(self) -> None:
        """RESET_OWNER (deprecated: what it does is the back-end's choice)."""
        await self._tell(Request.RESET_OWNER)

    async def get_features(self) -> int:
        """GET_FEATURES; `features` is brought up to date."""
        return await self._get_features(self.answer_timeout_s)

    async def _get_features(self, timeout_s: float | None) -> int:
        self.features = unpack_u64(await self._request(Message(Request.GET_FEATURES), timeout_s=timeout_s))
        return self.features

    async def set_features(self, features: int) -> None:
        """SET_FEATURES; the protocol feature bit is added when it is offered."""
        features |= self.features & F_PROTOCOL_FEATURES
        await self._tell(Request.SET_FEATURES, pack_u64(features))
        self.taken_features = features

    async def get_protocol_features(self) -> ProtocolFeature:
        """GET_PROTOCOL_FEATURES. Raises: NotNegotiated when the back-end says that it has none."""
        if not self.features & F_PROTOCOL_FEATURES:
            raise NotNegotiated(
                "the back-end does not offer VHOST_USER_F_PROTOCOL_FEATURES: it has none to be asked for"
            )
        self.offered_protocol_features = ProtocolFeature(await self._ask_u64(Request.GET_PROTOCOL_FEATURES))
        return self.offered_protocol_features

    async def set_protocol_features(self, wanted: ProtocolFeature) -> None:
        """SET_PROTOCOL_FEATURES; from here on refusals are noticed if REPLY_ACK is one of them.

        Raises: NotNegotiated for what is not offered, or in-band notifications without what they need.
        """
        missing = int(wanted) & ~int(self.offered_protocol_features)  # `~` of a flag knows only bits with a name
        if missing:
            raise NotNegotiated(f"the back-end does not offer the protocol features {missing:#x}")
        if ProtocolFeature.INBAND_NOTIFICATIONS in wanted and IN_BAND_NEEDS not in wanted:
            raise NotNegotiated("INBAND_NOTIFICATIONS needs BACKEND_REQ and REPLY_ACK as well")
        await self._tell(Request.SET_PROTOCOL_FEATURES, pack_u64(wanted))
        self.protocol_features = wanted

    async def negotiate_protocol(self, wanted: ProtocolFeature) -> ProtocolFeature:
        """Take those of the protocol features `wanted` that the back-end has, and own it. Returns what was taken."""
        if self.features & F_PROTOCOL_FEATURES:
            await self.set_protocol_features(await self.get_protocol_features() & wanted)
        await self.set_owner()
        return self.protocol_features

    async def get_queue_num(self) -> int:
        """GET_QUEUE_NUM: vrings that the back-end has; 1 when it cannot say (no MQ)."""
        if ProtocolFeature.MQ not in self.protocol_features:
            return 1
        return await self._ask_u64(Request.GET_QUEUE_NUM)
