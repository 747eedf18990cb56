"""QEMU as a process of ours: it never outlives us, and the terminal is what it was before."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import os
import signal
import sys
import termios
from asyncio.subprocess import Process
from collections.abc import Callable, Iterator, Sequence

_PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h
_libc = ctypes.CDLL(None, use_errno=True)


def _dies_with(parent: int) -> Callable[[], None]:
    """What the child does between fork and exec: ask the kernel to end it when `parent` is gone."""

    def arrange() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # gone before the kernel could be asked
            os._exit(1)

    return arrange


async def start_process(command: Sequence[str], pass_fds: Sequence[int]) -> Process:
    """Start `command` with our standard streams. It gets SIGKILL when this process ends, in whatever way."""
    return await asyncio.create_subprocess_exec(*command, pass_fds=pass_fds, preexec_fn=_dies_with(os.getpid()))


@contextlib.contextmanager
def terminal_kept() -> Iterator[None]:
    """Give standard input back as it was: QEMU makes it raw and non-blocking, and cannot tidy up when killed."""
    fd = sys.__stdin__.fileno() if sys.__stdin__ else 0
    try:
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    except OSError:
        yield  # standard input is closed: nothing to keep
        return
    modes = termios.tcgetattr(fd) if os.isatty(fd) else None
    try:
        yield
    finally:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
        if modes is not None:
            # One that was hung up, which is likely to be why we end, has no modes any more.
            with contextlib.suppress(termios.error):
                termios.tcsetattr(fd, termios.TCSADRAIN, modes)
