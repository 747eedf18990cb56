"""One worker process as the coordinator sees it: start it, command it, notice its end."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import sys
from collections.abc import Callable, Sequence

from vvupipe.errors import WorkerError
from vvupipe.fd_socket import wait_fd
from vvupipe.workers import commands, kernel_cache

#: Longest time for a command. A worker answers between two requests, so this bounds one request on a stuck disk.
COMMAND_TIMEOUT_S = 60.0
#: The first command may compile kernels.
OPEN_TIMEOUT_S = 300.0


class WorkerDied(WorkerError):
    """The process ended before it answered; its replacement can be given the command again."""


class WorkerHandle:
    """A running worker process. Every method is the coordinator's; one command at a time."""

    def __init__(
        self, process: asyncio.subprocess.Process, sock: socket.socket, raise_attention: Callable[[], None]
    ) -> None:
        self._process = process
        self._sock = sock
        self._raise_attention = raise_attention
        self._ids = itertools.count(1)
        self._lock = asyncio.Lock()
        self._ended = asyncio.ensure_future(process.wait())

    @classmethod
    async def spawn(cls, module: str, raise_attention: Callable[[], None]) -> WorkerHandle:
        """Start `python -m module` with its end of the command socket.

        raise_attention: called when a command has been sent, to make the worker's kernel return to it.
        Raises: WorkerError.
        """
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            raise WorkerError(f"cannot start a worker process: {error.strerror}") from error
        ours.setblocking(False)
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-P", "-m", module, "--fd", str(theirs.fileno()), "--parent", str(os.getpid())),
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    env=kernel_cache.environment(),
                )
        except OSError as error:
            ours.close()
            raise WorkerError(f"cannot start a worker process: {error.strerror}") from error
        return cls(process, ours, raise_attention)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    async def wait(self) -> int:
        """Wait for the end of the process; its return code (negative: the signal)."""
        return await asyncio.shield(self._ended)

    async def command(
        self, fields: commands.Fields, fds: Sequence[int] = (), timeout_s: float = COMMAND_TIMEOUT_S
    ) -> commands.Fields:
        """Send a command and await its answer.

        Raises: WorkerDied when the process ends first, WorkerError when the worker refuses or takes too long.
        """
        async with self._lock:
            number = next(self._ids)
            try:
                commands.send(self._sock, {**fields, "id": number}, fds)
            except OSError as error:
                if isinstance(error, ConnectionError) or self._sock.fileno() < 0:
                    raise WorkerDied(f"worker {self.pid} is gone") from error
                # It lives: nobody must wait for its end, which does not come.
                raise WorkerError(f"worker {self.pid} cannot be sent {fields['op']}: {error.strerror}") from error
            self._raise_attention()
            return await self._answer(number, str(fields["op"]), timeout_s)

    async def _answer(self, number: int, name: str, timeout_s: float) -> commands.Fields:
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    await wait_fd(self._sock.fileno())
                    packet = commands.receive(self._sock)
                    if packet is None:
                        raise WorkerDied(f"worker {self.pid} died in command {name}")
                    answer, _ = packet
                    if answer["id"] == number:
                        break
        except TimeoutError as error:
            raise WorkerError(f"worker {self.pid} did not answer {name} within {timeout_s:.0f} s") from error
        if "error" in answer:
            raise WorkerError(str(answer["error"]))
        return answer

    def release(self) -> None:
        """Close our end of the command socket: the process has ended."""
        self._sock.close()

    async def end(self) -> None:
        """Let the worker finish its request and end; kill it if that takes too long."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._raise_attention()
        try:
            await asyncio.wait_for(self.wait(), 2.0)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self.wait()
        self._sock.close()
