"""Waiting for a vhost-user back-end to listen, without using up a connection of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

from vvupipe.errors import UserError

_POLL_S = 0.1
_CONNECTED = 3  # include/uapi/linux/net.h: SS_CONNECTED
_SO_ACCEPTCON = 0x10000  # include/uapi/linux/net.h: the flag of a listening socket, as /proc/net/unix shows it


def is_listening(path: Path, table: Path = Path("/proc/net/unix")) -> bool:
    """Whether a process of this network namespace listens on the UNIX socket `path` (proc(5), /proc/net/unix)."""
    try:
        if not stat.S_ISSOCK(path.stat().st_mode):
            return False
    except OSError:
        return False
    wanted = os.path.realpath(path)
    for line in table.read_text(errors="surrogateescape").splitlines()[1:]:
        fields = line.split(maxsplit=7)  # Num RefCount Protocol Flags Type St Inode Path
        if len(fields) == 8 and int(fields[3], 16) & _SO_ACCEPTCON and _same(fields[7], wanted):
            return True
    return False


def is_connected(path: Path, table: Path = Path("/proc/net/unix")) -> bool:
    """Whether somebody has connected to the UNIX socket `path`."""
    wanted = os.path.realpath(path)
    for line in table.read_text(errors="surrogateescape").splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and int(fields[5], 16) == _CONNECTED and _same(fields[7], wanted):
            return True
    return False


def _same(bound: str, wanted: str) -> bool:
    """Whether the name that a socket was bound to may be the file `wanted`."""
    if bound.startswith("@"):
        return False
    if bound.startswith("/"):
        return os.path.realpath(bound) == wanted
    # Bound to a relative name, of a folder that the kernel does not tell: its last part must agree.
    parts = [part for part in os.path.normpath(bound).split("/") if part != ".."]
    return wanted.endswith("/" + "/".join(parts))


async def wait_for_backend(path: Path, timeout_s: float | None, say: Callable[[str], None]) -> None:
    """Return once somebody listens on `path`; `say` is told once when that is not so at first.

    Raises: UserError when `path` is no socket, or nobody came within `timeout_s` seconds.
    """
    try:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(path.stat().st_mode):
                raise UserError(f"{path} is no socket: name the one that the back-end listens on")
    except OSError as error:
        raise UserError(f"cannot connect to {path}: {error.strerror}") from error
    if is_listening(path):
        return
    say(f"waiting for a back-end at {path}")
    try:
        async with asyncio.timeout(timeout_s):
            while not is_listening(path):
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        raise UserError(
            f"no back-end at {path} after {timeout_s:.3g} s: start one (vvupipe device block --socket {path} ...)"
        ) from None
