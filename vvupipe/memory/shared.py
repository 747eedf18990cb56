"""POSIX shared memory: anonymous (for a control block) and named (for an embedded VM's RAM)."""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
import time
from pathlib import Path

import posix_ipc

from vvupipe.errors import UserError

PREFIX = "/vvupipe-"  #: every name of ours begins so, which lets a later start find what a killed one left

_FOLDER = Path("/dev/shm")  # where glibc's shm_open keeps them
_YOUNG_S = 5.0


def create_unnamed(size_bytes: int) -> int:
    """An fd of new, zeroed shared memory that no name leads to: nothing is left behind however we end.

    Raises: UserError when there is no room for it.
    """
    while True:
        name = f"{PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
        try:
            fd = _create(name, size_bytes)
        except posix_ipc.ExistentialError:
            continue
        posix_ipc.unlink_shared_memory(name)
        return fd


def create_named(name: str, size_bytes: int) -> int:
    """An fd of new, zeroed shared memory called `name` (which begins with PREFIX), locked as long as it is open.

    Raises: posix_ipc.ExistentialError when the name is taken, UserError when there is no room.
    """
    fd = _create(name, size_bytes)
    fcntl.flock(fd, fcntl.LOCK_EX)
    return fd


def create_sparse(name: str, size_bytes: int) -> int:
    """As create_named, but of memory that is mostly never touched: there need not be room for all of it."""
    fd = _create(name, size_bytes, reserve=False)
    fcntl.flock(fd, fcntl.LOCK_EX)
    return fd


def remove_stale() -> list[str]:
    """Remove this user's named objects whose owner was killed, and return their names."""
    removed = []
    for path in _FOLDER.glob(f"{PREFIX[1:]}{os.getuid()}-*"):
        try:
            # Everybody may put something there, also what has to be waited for or leads elsewhere.
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
        except OSError:
            continue  # its owner was quicker
        try:
            status = os.fstat(fd)
            ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid()
            # Between its creation and its lock an object is young.
            if ours and time.time() - status.st_ctime > _YOUNG_S:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                unlink(f"/{path.name}")
                removed.append(path.name)
        except BlockingIOError:
            continue
        finally:
            os.close(fd)
    return removed


def _create(name: str, size_bytes: int, *, reserve: bool = True) -> int:
    # The memory is given page by page when it is touched; without room for all of it that would end in a SIGBUS.
    space = os.statvfs(_FOLDER)
    free_bytes = space.f_bavail * space.f_frsize
    if reserve and size_bytes > free_bytes:
        raise UserError(
            f"no room for {size_bytes >> 20} MiB of shared memory, {_FOLDER} has {free_bytes >> 20} MiB free: "
            "use a smaller --mem or enlarge it"
        )
    try:
        shared = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600)
    except posix_ipc.ExistentialError:
        raise
    except (posix_ipc.Error, OSError) as error:
        raise UserError(f"no shared memory can be made in {_FOLDER}: {error}") from error
    try:
        os.ftruncate(shared.fd, size_bytes)
    except OSError as error:
        shared.close_fd()
        posix_ipc.unlink_shared_memory(name)
        raise UserError(f"no room for {size_bytes >> 20} MiB of shared memory: {error.strerror}") from error
    return int(shared.fd)


def unlink(name: str) -> None:
    """Remove the name; harmless when it is gone already."""
    try:
        posix_ipc.unlink_shared_memory(name)
    except posix_ipc.ExistentialError:
        return
