"""POSIX shared memory: anonymous (for a control block) and named (for an embedded VM's RAM)."""

from __future__ import annotations

import os
import secrets

import posix_ipc

from vvupipe.errors import UserError

PREFIX = "/vvupipe-"  #: every name of ours begins so, which lets a later start find what a killed one left


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
    """An fd of new, zeroed shared memory called `name` (which begins with PREFIX).

    Raises: posix_ipc.ExistentialError when the name is taken, UserError when there is no room.
    """
    return _create(name, size_bytes)


def _create(name: str, size_bytes: int) -> int:
    shared = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600)
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
