"""A UNIX socket whose bytes come with file descriptors, for asyncio (which itself knows nothing of SCM_RIGHTS)."""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import logging
import os
import socket
from collections.abc import Sequence

from vvupipe.errors import Disconnected, ProtocolError

log = logging.getLogger(__name__)

_ACCEPT_AGAIN_S = 1.0  # when no file can be opened
_FDS_IN_ONE_MESSAGE = 253  # SCM_MAX_FD of Linux


class FdSocket:
    """An owned, non-blocking AF_UNIX socket.

    One task may receive and one may send at a time. fds that arrive are close-on-exec and belong to the caller.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock

    async def receive_exactly(self, count: int) -> tuple[bytes, list[int]] | None:
        """`count` bytes and the fds that came with them; None at an orderly end before the first byte.

        Raises: Disconnected when the peer goes in the middle; ProtocolError when fds were cut off by the kernel.
        """
        data = bytearray()
        fds: list[int] = []
        # A peer that is always quicker than we must not keep everybody else from their turn.
        await asyncio.sleep(0)
        try:
            while len(data) < count:
                try:
                    chunk, more = self._receive_some(count - len(data))
                except BlockingIOError:
                    await self._wait(readable=True)
                    continue
                except ConnectionError:
                    chunk, more = b"", []
                fds += more
                if not chunk:
                    if data:
                        raise Disconnected(f"the peer left after {len(data)} of {count} bytes")
                    close_all(fds)
                    return None
                data += chunk
        except BaseException:
            close_all(fds)
            raise
        return bytes(data), fds

    def _receive_some(self, count: int) -> tuple[bytes, list[int]]:
        room = socket.CMSG_SPACE(_FDS_IN_ONE_MESSAGE * array.array("i").itemsize)
        chunk, ancillary, flags, _ = self._sock.recvmsg(count, room, socket.MSG_CMSG_CLOEXEC)
        fds = array.array("i")
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
        if flags & socket.MSG_CTRUNC:
            close_all(fds)
            raise ProtocolError("file descriptors were lost on the way: this process has too many open")
        return chunk, list(fds)

    async def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send all of `data`, with `fds` on its first byte. Raises: Disconnected."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        view = memoryview(data)
        while view:
            try:
                sent = self._sock.sendmsg([view], ancillary)
            except BlockingIOError:
                await self._wait(readable=False)
                continue
            except ConnectionError as error:
                raise Disconnected("the peer left while a message was sent to it") from error
            view = view[sent:]
            ancillary = []

    async def _wait(self, *, readable: bool) -> None:
        await wait_fd(self._sock.fileno(), readable=readable)

    @property
    def peer_pid(self) -> int:
        """Process id of whoever connected (SO_PEERCRED)."""
        return peer_pid(self._sock)

    def fileno(self) -> int:
        """The fd, for poll(2); it stays the socket's."""
        return self._sock.fileno()

    def shut_down(self) -> None:
        """Make the peer see an end and our own pending receive return, without freeing the fd."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()


def peer_pid(sock: socket.socket) -> int:
    """Process id of whoever connected a UNIX socket (SO_PEERCRED)."""
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], "little")


async def wait_fd(fd: int, *, readable: bool = True) -> None:
    """Return once `fd` is readable (or writable)."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    (loop.add_reader if readable else loop.add_writer)(fd, wake)
    try:
        await ready
    finally:
        (loop.remove_reader if readable else loop.remove_writer)(fd)


async def accept(listening: socket.socket, who: str) -> socket.socket:
    """The next connection to a non-blocking socket. `who` has to wait, as the log says, while no file can be opened.

    Raises: OSError.
    """
    while True:
        await wait_fd(listening.fileno())
        try:
            return listening.accept()[0]
        except (BlockingIOError, ConnectionAbortedError):
            continue
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            log.warning("%s has to wait: %s", who, error.strerror)
            await asyncio.sleep(_ACCEPT_AGAIN_S)


def dup_all(fds: Sequence[int]) -> list[int]:
    """Duplicates of every fd of the list, all or none. Raises: OSError."""
    copies: list[int] = []
    try:
        for fd in fds:
            copies.append(os.dup(fd))
    except OSError:
        close_all(copies)
        raise
    return copies


def close_all(fds: Sequence[int]) -> None:
    """Close every fd of the list."""
    for fd in fds:
        os.close(fd)
