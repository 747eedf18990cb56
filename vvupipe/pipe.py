"""Whole transfers through a pipe whose end does not block, for asyncio."""

from __future__ import annotations

import os

from vvupipe.fd_socket import wait_fd

_CHUNK_BYTES = 64 << 10


async def read_all(fd: int, most_bytes: int | None = None) -> bytes:
    """Everything until the writer closes its end. `fd` stays the caller's.

    Raises: ValueError when more than `most_bytes` come, OSError.
    """
    data = bytearray()
    while True:
        try:
            part = os.read(fd, _CHUNK_BYTES)
        except BlockingIOError:
            await wait_fd(fd)
            continue
        if not part:
            return bytes(data)
        data += part
        if most_bytes is not None and len(data) > most_bytes:
            raise ValueError(f"more than {most_bytes} bytes came")


async def write_all(fd: int, data: bytes) -> None:
    """Write all of `data`. `fd` stays the caller's. Raises: OSError, BrokenPipeError when nobody reads."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view[:_CHUNK_BYTES]) :]
        except BlockingIOError:
            await wait_fd(fd, readable=False)
