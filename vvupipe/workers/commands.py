"""Commands between coordinator and worker: one JSON object and its file descriptors in one packet.

The socket is SOCK_SEQPACKET, so a packet is a command; an answer carries the command's `id`.
"""

from __future__ import annotations

import array
import json
import socket
from collections.abc import Sequence
from typing import Any

PACKET_MAX_BYTES = 64 << 10
FDS_MAX = 64
#: Exit status of a worker whose guest memory has lost pages: it makes way for another one.
MEMORY_LOST = 3

Fields = dict[str, Any]


def send(sock: socket.socket, fields: Fields, fds: Sequence[int] = ()) -> None:
    """Send one packet. Raises: OSError when the other side is gone or its queue is full (non-blocking socket)."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([json.dumps(fields).encode()], ancillary)


def receive(sock: socket.socket) -> tuple[Fields, list[int]] | None:
    """The next packet; None when the other side is gone.

    Raises: BlockingIOError when none is there and the socket does not block.
    """
    room = socket.CMSG_SPACE(FDS_MAX * array.array("i").itemsize)
    try:
        data, ancillary, _, _ = sock.recvmsg(PACKET_MAX_BYTES, room, socket.MSG_CMSG_CLOEXEC)
    except ConnectionError:
        return None
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    if not data:
        return None
    fields: Fields = json.loads(data)
    return fields, list(fds)
