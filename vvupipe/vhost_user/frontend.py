"""The front-end side of vhost-user: find a back-end, then every request of the specification that a block device takes.

Specification: QEMU docs/interop/vhost-user.rst. The requests stand where the back-end has its part of them too:
connection and negotiation in frontend_connection, then frontend_vrings, frontend_memory, frontend_device; what the
back-end asks of us in frontend_channel.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from pathlib import Path

from vvupipe.errors import Disconnected, UserError
from vvupipe.unix_path import connect_if_there
from vvupipe.vhost_user.frontend_channel import ChannelHandlers, FrontendChannel
from vvupipe.vhost_user.frontend_device import FrontendDevice
from vvupipe.vhost_user.frontend_memory import FrontendMemory
from vvupipe.vhost_user.frontend_vrings import FrontendVrings
from vvupipe.vhost_user.messages import ProtocolFeature, Request
from vvupipe.vhost_user.socket_transport import MessageSocket

__all__ = ["Frontend"]

_RETRY_S = 0.1  # between two looks for a back-end that is not there
_SILENCE_S = 1.0  # a back-end that has not answered its first message by then is worth a line


class Frontend(FrontendVrings, FrontendMemory, FrontendDevice):
    """One connection to a back-end, with every request. Errors: see FrontendConnection."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self._channel: FrontendChannel | None = None

    @classmethod
    async def connect(cls, path: Path, timeout_s: float | None, say: Callable[[str], None]) -> Frontend:
        """Connect to the back-end at `path` and hear its features, waiting until there is one that answers.

        A VVU proxy (or a back-end that is busy with another front-end) lets us connect and answers later; that is
        waited for too. `say` is told once for each thing that is waited for.

        Raises: UserError when `path` can be no socket, or nobody answered within `timeout_s` seconds.
        """
        try:
            other = path.exists() and not path.is_socket()
        except OSError as error:
            raise UserError(f"cannot connect to {path}: {error.strerror}") from error
        if other:
            raise UserError(f"{path} is no socket: name the one that the back-end listens on")
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        told = _Once(say)
        while True:
            sock = await _connect(path, deadline, timeout_s, told)
            frontend = cls(sock)
            try:
                if await frontend._first_answer(path, deadline, timeout_s, told):
                    return frontend
            except BaseException:
                await frontend.close()
                raise
            await frontend.close()
            await asyncio.sleep(_RETRY_S)

    async def _first_answer(self, path: Path, deadline: float | None, timeout_s: float | None, told: _Once) -> bool:
        """Ask for the features. False when the back-end closed the connection without an answer."""
        asking = asyncio.create_task(self._get_features(None))
        try:
            left = _left(deadline)
            await asyncio.wait({asking}, timeout=_SILENCE_S if left is None else min(_SILENCE_S, left))
            if not asking.done():
                told.say(f"connected to {path}, waiting for the back-end to answer")
                await asyncio.wait({asking}, timeout=_left(deadline))
            if not asking.done():
                raise UserError(
                    f"the back-end at {path} did not answer within {timeout_s:.3g} s: is there one behind it, "
                    "and is it free?"
                )
            asking.result()
        except Disconnected:
            if deadline is not None and time.monotonic() >= deadline:
                raise UserError(f"the back-end at {path} closes every connection") from None
            told.say(f"the back-end at {path} closed the connection, trying again")
            return False
        finally:
            if not asking.done():
                asking.cancel()
                await asyncio.wait({asking})
        return True

    async def open_channel(self, handlers: ChannelHandlers) -> FrontendChannel:
        """SET_BACKEND_REQ_FD: a new back-end channel, in the place of the one before. It is closed with the connection.

        Requests that need an answer get one if REPLY_ACK was negotiated by now.
        """
        self.needs(Request.SET_BACKEND_REQ_FD)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            # We listen before the back-end can speak.
            acks = ProtocolFeature.REPLY_ACK in self.protocol_features
            channel = FrontendChannel(MessageSocket(ours), handlers, acks=acks)
            try:
                await self._tell(Request.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
            except BaseException:
                await channel.close()
                raise
        before, self._channel = self._channel, channel
        if before:
            await before.close()
        return channel

    async def close(self) -> None:
        """Disconnect. Harmless when called again."""
        await super().close()
        if self._channel:
            await self._channel.close()


class _Once:
    """Says each line once, however often it is waited again."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._said: set[str] = set()

    def say(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._say(line)


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())


async def _connect(path: Path, deadline: float | None, timeout_s: float | None, told: _Once) -> socket.socket:
    """A connected socket, as soon as somebody listens. Raises: UserError."""
    while True:
        if sock := connect_if_there(path):
            return sock
        if deadline is not None and time.monotonic() >= deadline:
            raise UserError(
                f"no back-end at {path} after {timeout_s:.3g} s: start one (vvupipe device block --socket {path} ...)"
            )
        told.say(f"waiting for a back-end at {path}")
        await asyncio.sleep(_RETRY_S)
