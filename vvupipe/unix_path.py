"""UNIX sockets at paths, also at those that are longer than sockaddr_un takes."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from vvupipe.errors import UserError

_PATH_MAX_BYTES = 107  # sun_path of Linux, without its final zero


@contextlib.contextmanager
def reachable(path: Path) -> Iterator[str]:
    """A name for `path` that bind and connect take, however long it is; valid inside the `with`.

    Raises: OSError when the folder does not exist.
    """
    if len(os.fsencode(path)) <= _PATH_MAX_BYTES:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def connect_if_there(path: Path) -> socket.socket | None:
    """A connected, non-blocking stream socket; None while nobody listens at `path`, or its queue is full.

    Raises: UserError when waiting would not help.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        with reachable(path) as name:
            sock.connect(name)
    except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
        sock.close()
        return None
    except OSError as error:
        sock.close()
        raise UserError(f"cannot connect to {path}: {error.strerror or error}") from error
    return sock


def listen_private(path: Path) -> socket.socket:
    """A socket that listens at `path`, for this user only. Raises: UserError."""
    sock = socket.socket(socket.AF_UNIX)
    mask = os.umask(0o177)
    try:
        with reachable(path) as short:
            sock.bind(short)
        sock.listen(4)
    except OSError as error:
        sock.close()
        raise UserError(f"cannot listen at {path}: {error.strerror}") from error
    finally:
        os.umask(mask)
    return sock
