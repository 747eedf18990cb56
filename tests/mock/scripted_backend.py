"""The other end of a front-end's socket, message by message: its own encoding (struct), nothing happens by itself."""

import asyncio
import os
import select
import socket
import struct

from tests.mock.frontend import HEADER, NEED_REPLY, REPLY


class ScriptedBackend:
    """`socket_of_front_end` is for the front-end, which owns it. fds that come are kept until `close`."""

    def __init__(self):
        self.socket_of_front_end, self.sock = socket.socketpair()
        self.sock.settimeout(10)
        self._fds = []

    def close(self):
        self.sock.close()
        self.close_fds()

    def close_fds(self):
        """Close what came so far."""
        while self._fds:
            os.close(self._fds.pop())

    def forget_fds(self):
        """What came so far is the caller's."""
        self._fds.clear()

    def receive(self):
        """(request, flags, payload, fds) of the next message."""
        head, fds, _, _ = socket.recv_fds(self.sock, HEADER.size, 16)
        assert len(head) == HEADER.size, "the front-end left"
        self._fds += fds
        request, flags, size = HEADER.unpack(head)
        payload = self.sock.recv(size, socket.MSG_WAITALL) if size else b""
        return request, flags, payload, fds

    def send(self, request, payload=b"", fds=(), flags=1 | REPLY):
        socket.send_fds(self.sock, [HEADER.pack(request, flags, len(payload)) + payload], list(fds))

    def has_nothing(self):
        """Whether no byte waits to be received; the end of the connection may."""
        return not select.select([self.sock], [], [], 0)[0] or not self.sock.recv(1, socket.MSG_PEEK)

    def gone(self):
        """Whether the front-end closed the connection, as soon as it has; what it sent before is skipped."""
        while self.sock.recv(4096):
            pass
        return True

    async def during(self, asking, request, payload=b"", files=(), *, flags=1, answer=None, answer_fds=()):
        """Await `asking` (a coroutine) while the one message that it sends is checked and answered.

        files: fds of the files that must come with it. answer: a payload, (request, payload), or None for silence.
        """
        task = asyncio.create_task(asking)
        try:
            got = await asyncio.to_thread(self.receive)
            assert got[:3] == (request, flags, payload)
            assert [os.fstat(fd).st_ino for fd in got[3]] == [os.fstat(fd).st_ino for fd in files]
            if answer is not None:
                answered, body = answer if isinstance(answer, tuple) else (request, answer)
                self.send(answered, body, answer_fds)
            return await task
        finally:
            task.cancel()

    async def acknowledge(self, asking, request, payload=b"", files=(), code=0):
        """As `during`, for a request whose answer is REPLY_ACK's."""
        answer = struct.pack("=Q", code)
        return await self.during(asking, request, payload, files, flags=1 | NEED_REPLY, answer=answer)
