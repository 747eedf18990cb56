"""vhost-user on a UNIX socket: messages as bytes, memory and doorbells as the file descriptors that come with them."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
from pathlib import Path

from vvupipe.errors import Disconnected, ProtocolError, TransportError, UserError
from vvupipe.fd_socket import FdSocket, accept, close_all
from vvupipe.memory.doorbell import Doorbell
from vvupipe.memory.region import MemoryRegion
from vvupipe.memory.shared import create_unnamed
from vvupipe.vhost_user.messages import HEADER, MAX_FDS, Message, ProtocolFeature, unpack_header
from vvupipe.vhost_user.payloads import VRING_NO_FD, unpack_memory_table, unpack_single_region, unpack_u64
from vvupipe.vhost_user.transport import FileArea

log = logging.getLogger(__name__)

_FILE_END = 1 << 63  # off_t is signed
_BACKLOG = 16  # front-ends that may wait for their turn


class MessageSocket:
    """Whole vhost-user messages over a connected UNIX socket; either end uses it."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = FdSocket(sock)

    async def receive(self) -> Message | None:
        """The next message with its fds; None at an orderly end.

        Raises: ProtocolError when the framing is broken, Disconnected when the peer left in the middle.
        """
        start = await self._socket.receive_exactly(HEADER.size)
        if start is None:
            return None
        head, fds = start
        try:
            request, flags, size = unpack_header(head)
            payload = b""
            if size:
                rest = await self._socket.receive_exactly(size)
                if rest is None:
                    raise Disconnected(f"the peer left after the header of request {request}")
                payload = rest[0]
                fds += rest[1]
            if len(fds) > MAX_FDS:
                raise ProtocolError(f"{len(fds)} file descriptors with request {request}, at most {MAX_FDS} may come")
        except BaseException:
            close_all(fds)
            raise
        return Message(request, payload, flags, fds)

    async def send(self, message: Message) -> None:
        """Send a message and its fds, which stay the caller's. Raises: Disconnected."""
        await self._socket.send(message.pack(), message.fds)

    def shut_down(self) -> None:
        """Wake whoever waits on this socket, at either end; `close` comes later."""
        self._socket.shut_down()

    def close(self) -> None:
        """Close the socket; the peer sees an end."""
        self._socket.close()


class SocketConnection:
    """Implements transport.Connection: everything comes with the message."""

    protocol_features = ProtocolFeature(~0)

    def __init__(self, sock: socket.socket) -> None:
        self._messages = MessageSocket(sock)

    async def receive(self) -> Message | None:
        """See transport.Connection."""
        return await self._messages.receive()

    async def send(self, message: Message) -> None:
        """See transport.Connection."""
        await self._messages.send(message)

    async def memory_regions(self, message: Message) -> list[MemoryRegion]:
        """See transport.Connection: one fd for each region, in the same order."""
        entries = unpack_memory_table(message)
        if len(entries) != len(message.fds):
            raise ProtocolError(f"{len(entries)} memory regions with {len(message.fds)} file descriptors")
        for entry, fd in zip(entries, message.fds, strict=True):
            check_backing(fd, entry.mmap_offset + entry.size_bytes)
        return [
            MemoryRegion(entry.gpa, entry.size_bytes, entry.uva, message.take_fd(), entry.mmap_offset)
            for entry in entries
        ]

    async def added_region(self, message: Message) -> list[MemoryRegion]:
        """See transport.Connection: exactly one fd."""
        entry = unpack_single_region(message)
        if len(message.fds) != 1:
            raise ProtocolError(f"a memory slot with {len(message.fds)} file descriptors")
        check_backing(message.fds[0], entry.mmap_offset + entry.size_bytes)
        return [MemoryRegion(entry.gpa, entry.size_bytes, entry.uva, message.take_fd(), entry.mmap_offset)]

    async def area(self, message: Message, size_bytes: int, offset: int) -> FileArea:
        """See transport.Connection: the file that comes with the message."""
        if len(message.fds) != 1:
            raise ProtocolError(f"{message.name} with {len(message.fds)} file descriptors")
        check_backing(message.fds[0], offset + size_bytes)
        return FileArea(message.take_fd(), size_bytes, offset)

    def attach_area(self, reply: Message, size_bytes: int) -> None:
        """See transport.Connection: an unnamed file; `reply` owns it."""
        reply.fds.append(create_unnamed(size_bytes))

    def kick(self, message: Message) -> int | None:
        """See transport.Connection. Non-blocking, as whoever drains it must never be made to wait."""
        fd = self._eventfd(message)
        if fd is None:
            return None
        try:
            os.set_blocking(fd, False)
        except OSError:
            os.close(fd)
            raise
        return fd

    def call(self, message: Message) -> Doorbell | None:
        """See transport.Connection."""
        fd = self._eventfd(message)
        return None if fd is None else _doorbell(fd)

    def err(self, message: Message) -> Doorbell | None:
        """See transport.Connection."""
        return self.call(message)

    def log_event(self, message: Message) -> Doorbell | None:
        """See transport.Connection."""
        return _doorbell(message.take_fd())

    def back_end_channel(self, message: Message) -> MessageSocket:
        """See transport.Connection: the socket that comes with the message."""
        fd = message.take_fd()
        try:
            sock = socket.socket(fileno=fd)
        except OSError as error:
            os.close(fd)
            raise ProtocolError(f"{message.name} with a file descriptor that is no socket") from error
        if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
            sock.close()
            raise ProtocolError(f"{message.name} with a socket that carries no stream of messages")
        return MessageSocket(sock)

    def shut_down(self) -> None:
        """Wake a pending receive or send; both then see an end."""
        self._messages.shut_down()

    @staticmethod
    def _eventfd(message: Message) -> int | None:
        if unpack_u64(message) & VRING_NO_FD:
            return None
        return message.take_fd()

    def close(self) -> None:
        """See transport.Connection."""
        self._messages.close()


def _doorbell(fd: int) -> Doorbell:
    """Non-blocking: a counter that is full must not keep a worker waiting. One that cannot be is of no use anyway."""
    with contextlib.suppress(OSError):
        os.set_blocking(fd, False)
    return Doorbell(fd)


def check_backing(fd: int, needed_bytes: int) -> None:
    """Raises: ProtocolError when a region ends beyond any file, or a regular file is too short for it."""
    if needed_bytes >= _FILE_END:
        raise ProtocolError(f"memory region ends at byte {needed_bytes}, where no file ends")
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode) and status.st_size < needed_bytes:
        raise ProtocolError(f"memory region ends at byte {needed_bytes} of a file of {status.st_size}")


class SocketTransport:
    """Implements transport.Transport on a listening socket, or on one that is connected already."""

    def __init__(self, sock: socket.socket, path: Path | None, *, connected: bool = False) -> None:
        sock.setblocking(False)
        self._sock: socket.socket | None = sock
        self._path = path
        self._connected = connected

    @classmethod
    def listen(cls, path: Path) -> SocketTransport:
        """Listen at `path`, mode 0600. A socket file that nobody listens on any more is replaced.

        Raises: UserError when it is in use or cannot be made.
        """
        return cls(listen_at(path), path)

    @classmethod
    def from_fd(cls, fd: int) -> SocketTransport:
        """Use an inherited socket, listening or connected. Raises: UserError when it is neither."""
        try:
            sock = socket.socket(fileno=os.dup(fd))
            listening = bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        except OSError as error:
            raise UserError(f"--fd {fd} is not a socket that this process inherited: {error.strerror}") from error
        if sock.family != socket.AF_UNIX:
            raise UserError(f"--fd {fd} is not a UNIX socket: file descriptors cannot cross it")
        return cls(sock, None, connected=not listening)

    async def accept(self) -> SocketConnection:
        """See transport.Transport. A socket that was handed over connected serves one front-end."""
        if self._sock is None:
            raise TransportError("the socket that was handed over has served its front-end")
        if self._connected:
            sock, self._sock = self._sock, None
            return SocketConnection(sock)
        return SocketConnection(await accept(self._sock, f"{self.describe()}: a front-end"))

    def close(self) -> None:
        """See transport.Transport."""
        if self._sock:
            self._sock.close()
            self._sock = None
            if self._path:
                self._path.unlink(missing_ok=True)

    def describe(self) -> str:
        """See transport.Transport."""
        return f"socket {self._path}" if self._path else "the inherited socket"


def listen_at(path: Path) -> socket.socket:
    """A listening UNIX socket at `path`, mode 0600.

    Raises: UserError when another process listens there, or it cannot be made.
    """
    if path.is_socket():
        probe = socket.socket(socket.AF_UNIX)
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)  # its owner was killed
        except OSError:
            raise UserError(f"{path} is in use by another process: choose another path or stop that one") from None
        else:
            raise UserError(f"{path} is in use by another process: choose another path or stop that one")
        finally:
            probe.close()
    sock = socket.socket(socket.AF_UNIX)
    mask = os.umask(0o177)
    try:
        sock.bind(str(path))
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        reason = "the path is too long" if "too long" in str(error) else error.strerror
        raise UserError(f"cannot listen at {path}: {reason}") from error
    finally:
        os.umask(mask)
    return sock
