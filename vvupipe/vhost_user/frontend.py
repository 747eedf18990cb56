"""The front-end side of vhost-user: a connection to a back-end and the requests that drive it.

Specification: QEMU docs/interop/vhost-user.rst. A task reads the socket all the time, so a disconnect is noticed when
it happens and not at the next request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from vvupipe.errors import Disconnected, ProtocolError, UserError
from vvupipe.fd_socket import FdSocket
from vvupipe.memory.region import MemoryRegion
from vvupipe.unix_path import reachable
from vvupipe.vhost_user.messages import (
    ANSWERED,
    F_PROTOCOL_FEATURES,
    FLAG_NEED_REPLY,
    HEADER,
    VERSION,
    ConfigAccess,
    Message,
    ProtocolFeature,
    RegionEntry,
    Request,
    VringAddress,
    VringState,
    pack_memory_table,
    pack_u64,
    unpack_header,
    unpack_u64,
)

__all__ = ["Frontend"]

log = logging.getLogger(__name__)

#: What this front-end makes use of.
PROTOCOL_FEATURES = ProtocolFeature.MQ | ProtocolFeature.CONFIG | ProtocolFeature.REPLY_ACK

_RETRY_S = 0.1  # between two looks for a back-end that is not there
_SILENCE_S = 1.0  # a back-end that has not answered its first message by then is worth a line
_ANSWER_TIMEOUT_S = 60.0  # for every later answer: a back-end may finish a slow request before it gives one


class Frontend:
    """One connection to a back-end. `features` and `protocol_features` are those that it offers.

    Requests may come from several tasks; each waits for its turn and its answer. All raise Disconnected when the
    back-end goes, ProtocolError when it answers what it must not, and ProtocolError when it refuses (REPLY_ACK) or
    does not answer for a minute.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = FdSocket(sock)
        self._turn = asyncio.Lock()
        self._acks = False
        self._answer: asyncio.Future[Message] | None = None
        self._reader = asyncio.create_task(self._read())
        self._error = ProtocolError("")
        self.features = 0
        self.protocol_features = ProtocolFeature(0)
        #: Done when the back-end is gone or broke the protocol: the reason, for a person.
        self.closed: asyncio.Future[str] = asyncio.get_running_loop().create_future()

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
        asking = asyncio.create_task(self._ask(Request.GET_FEATURES, timeout_s=None))
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
            self.features = unpack_u64(asking.result())
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

    async def negotiate_protocol(self) -> None:
        """Take the protocol features that both sides have; from here on refusals are noticed (REPLY_ACK).

        Raises: ProtocolError when the back-end has no protocol features at all or no configuration space.
        """
        if not self.features & F_PROTOCOL_FEATURES:
            raise ProtocolError("the back-end offers no protocol features, so it cannot tell the size of its disk")
        offered = ProtocolFeature(unpack_u64(await self._ask(Request.GET_PROTOCOL_FEATURES)))
        if ProtocolFeature.CONFIG not in offered:
            raise ProtocolError("the back-end has no configuration space (CONFIG): it cannot tell the size of its disk")
        self.protocol_features = offered & PROTOCOL_FEATURES
        await self._tell(Request.SET_PROTOCOL_FEATURES, pack_u64(self.protocol_features))
        self._acks = ProtocolFeature.REPLY_ACK in self.protocol_features
        await self._tell(Request.SET_OWNER)

    async def set_features(self, features: int) -> None:
        """SET_FEATURES; the protocol feature bit is added."""
        await self._tell(Request.SET_FEATURES, pack_u64(features | F_PROTOCOL_FEATURES))

    async def get_queue_num(self) -> int:
        """Vrings that the back-end has; 1 when it cannot say (no MQ)."""
        if ProtocolFeature.MQ not in self.protocol_features:
            return 1
        return unpack_u64(await self._ask(Request.GET_QUEUE_NUM))

    async def get_config(self, offset: int, size_bytes: int) -> bytes:
        """Bytes of the device's configuration space."""
        request = ConfigAccess(offset, size_bytes, 0, bytes(size_bytes))
        answer = await self._ask(Request.GET_CONFIG, request.pack())
        if not answer.payload:
            raise ProtocolError(f"the back-end refused GET_CONFIG of {size_bytes} bytes at {offset}")
        data = ConfigAccess.unpack(answer).data
        if len(data) != size_bytes:
            raise ProtocolError(f"GET_CONFIG of {size_bytes} bytes was answered with {len(data)}")
        return data

    async def set_memory_table(self, regions: Sequence[MemoryRegion]) -> None:
        """SET_MEM_TABLE; the fds stay the caller's."""
        entries = [RegionEntry(part.gpa, part.size_bytes, part.uva, part.fd_offset) for part in regions]
        await self._tell(Request.SET_MEM_TABLE, pack_memory_table(entries), [part.fd for part in regions])

    async def set_vring_num(self, index: int, size: int) -> None:
        """SET_VRING_NUM: entries of the vring."""
        await self._tell(Request.SET_VRING_NUM, VringState(index, size).pack())

    async def set_vring_addr(self, index: int, *, descriptor_uva: int, available_uva: int, used_uva: int) -> None:
        """SET_VRING_ADDR: where the vring is, in the addresses of the memory table's third column."""
        await self._tell(Request.SET_VRING_ADDR, VringAddress(index, 0, descriptor_uva, used_uva, available_uva).pack())

    async def set_vring_base(self, index: int, base: int) -> None:
        """SET_VRING_BASE: the available index to start at."""
        await self._tell(Request.SET_VRING_BASE, VringState(index, base).pack())

    async def get_vring_base(self, index: int) -> int:
        """GET_VRING_BASE: stop the vring; the available index at which it stopped."""
        state = VringState.unpack(await self._ask(Request.GET_VRING_BASE, VringState(index, 0).pack()))
        if state.index != index:
            raise ProtocolError(f"GET_VRING_BASE of vring {index} was answered for vring {state.index}")
        return state.num

    async def set_vring_kick(self, index: int, fd: int) -> None:
        """SET_VRING_KICK: the eventfd that we write when there is work."""
        await self._tell(Request.SET_VRING_KICK, pack_u64(index), [fd])

    async def set_vring_call(self, index: int, fd: int) -> None:
        """SET_VRING_CALL: the eventfd that the back-end writes when work is done."""
        await self._tell(Request.SET_VRING_CALL, pack_u64(index), [fd])

    async def set_vring_err(self, index: int, fd: int) -> None:
        """SET_VRING_ERR: the eventfd that the back-end writes when the vring is broken."""
        await self._tell(Request.SET_VRING_ERR, pack_u64(index), [fd])

    async def set_vring_enable(self, index: int, enable: bool) -> None:
        """SET_VRING_ENABLE."""
        await self._tell(Request.SET_VRING_ENABLE, VringState(index, int(enable)).pack())

    async def close(self) -> None:
        """Disconnect. Harmless when called again."""
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader
        self._end(Disconnected("closed by us"))
        self._socket.close()

    async def _ask(
        self,
        request: Request,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        timeout_s: float | None = _ANSWER_TIMEOUT_S,
    ) -> Message:
        """Send a request and await its answer: one of its own, or the acknowledgement."""
        flags = VERSION if request in ANSWERED else VERSION | FLAG_NEED_REPLY
        async with self._turn:
            self._check_open()
            self._answer = asyncio.get_running_loop().create_future()
            log.debug("-> %s, %d bytes", request.name, len(payload))
            try:
                await self._socket.send(Message(request, payload, flags).pack(), fds)
                async with asyncio.timeout(timeout_s):
                    answer = await self._answer
            except TimeoutError:
                # A late answer could be taken for that of the next request: this connection is of no more use.
                self._socket.shut_down()
                raise ProtocolError(f"the back-end did not answer {request.name} within {timeout_s:g} s") from None
            finally:
                self._answer = None
            if answer.request != request:
                self._socket.shut_down()
                raise ProtocolError(f"the back-end answered {request.name} with {answer.name}")
            return answer

    async def _tell(self, request: Request, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send a request that has no answer of its own. Raises: ProtocolError when it is refused."""
        if not self._acks:
            async with self._turn:
                self._check_open()
                log.debug("-> %s, %d bytes", request.name, len(payload))
                await self._socket.send(Message(request, payload).pack(), fds)
            return
        if unpack_u64(await self._ask(request, payload, fds)):
            raise ProtocolError(f"the back-end refused {request.name}")

    def _check_open(self) -> None:
        if self.closed.done():
            raise type(self._error)(str(self._error))

    async def _read(self) -> None:
        try:
            while True:
                message = await self._receive()
                if message is None:
                    self._end(Disconnected("the back-end closed the connection"))
                    return
                message.close_fds()  # no answer that we ask for has any
                if not message.is_reply or self._answer is None or self._answer.done():
                    raise ProtocolError(f"the back-end sent {message.name}, which nobody asked for")
                self._answer.set_result(message)
        except ProtocolError as error:
            self._end(error)
            self._socket.shut_down()
        except OSError as error:
            self._end(Disconnected(str(error)))
            self._socket.shut_down()

    async def _receive(self) -> Message | None:
        head = await self._socket.receive_exactly(HEADER.size)
        if head is None:
            return None
        data, fds = head
        try:
            request, flags, size = unpack_header(data)
            body = await self._socket.receive_exactly(size) if size else (b"", [])
            if body is None:
                raise Disconnected("the back-end left in the middle of a message")
        except BaseException:
            Message(0, fds=fds).close_fds()
            raise
        return Message(request, body[0], flags, fds + body[1])

    def _end(self, error: ProtocolError) -> None:
        if not self.closed.done():
            self._error = error
            self.closed.set_result(str(error))
        if self._answer and not self._answer.done():
            self._answer.set_exception(error)


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
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            with reachable(path) as name:
                sock.connect(name)
            return sock
        except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
            sock.close()  # nobody there, nobody listening, or its queue of connections is full
        except OSError as error:
            sock.close()
            raise UserError(f"cannot connect to {path}: {error.strerror or error}") from error
        if deadline is not None and time.monotonic() >= deadline:
            raise UserError(
                f"no back-end at {path} after {timeout_s:.3g} s: start one (vvupipe device block --socket {path} ...)"
            )
        told.say(f"waiting for a back-end at {path}")
        await asyncio.sleep(_RETRY_S)
