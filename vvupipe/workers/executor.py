"""The worker's end of the command socket: take commands, execute them, answer."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import sys

from vvupipe.errors import WorkerError
from vvupipe.workers import commands

_PR_SET_PDEATHSIG = 1  # prctl(2)


class CommandExecutor:
    """Base of a process that is commanded: command `op` is method `_do_op(fields, fds)`.

    A method returns the fields of its answer, or None; an OSError, ValueError or WorkerError becomes the answer's
    `error`. fds that it leaves in the list are closed behind it.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def take_first_command(self) -> bool:
        """Wait for a command that succeeds. False when the coordinator has gone."""
        while (packet := commands.receive(self._sock)) is not None:
            if self._execute(*packet):
                return True
        return False

    def take_commands(self) -> bool:
        """Execute what waits. False when the coordinator has gone."""
        while select.select([self._sock], [], [], 0)[0]:
            packet = commands.receive(self._sock)
            if packet is None:
                return False
            self._execute(*packet)
        return True

    def _execute(self, fields: commands.Fields, fds: list[int]) -> bool:
        answer: commands.Fields = {"id": fields["id"]}
        try:
            answer.update(getattr(self, f"_do_{fields['op']}")(fields, fds) or {})
        except (OSError, ValueError, WorkerError) as error:
            answer["error"] = str(error)
        finally:
            for fd in fds:
                os.close(fd)
            fds.clear()
        try:
            commands.send(self._sock, answer)
        except OSError:
            sys.exit(0)  # the coordinator has gone, as it does when it is interrupted while we compile
        return "error" not in answer


def command_socket(arguments: list[str]) -> socket.socket:
    """The socket that `--fd N --parent PID` tells of, with this process tied to its parent's life."""
    fd, parent = int(arguments[1]), int(arguments[3])
    die_with_parent(parent)
    # Ctrl-C reaches the whole foreground group; the coordinator decides when its workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return socket.socket(fileno=fd)


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill us when the coordinator dies, however it dies."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        sys.exit(1)
