"""A relay between a front-end and a back-end that writes down each vhost-user message, fds and all passed on.

It shows what no guest can tell: when the rings were started and stopped, and how far each phase got. Written with
`struct` and the specification's numbers, so that it does not lean on the code under test.
"""

import array
import contextlib
import os
import socket
import struct
import threading
from dataclasses import dataclass

HEADER = struct.Struct("=III")
GET_VRING_BASE = 11
SET_VRING_KICK = 12


@dataclass(frozen=True)
class Entry:
    """One message; `stay` counts the front-end's connections from 0."""

    stay: int
    from_frontend: bool
    request: int
    payload: bytes


class Relay:
    """Listens on `path`, takes one front-end after another and connects each to `target`."""

    def __init__(self, path, target):
        self._target = str(target)
        self.entries = []
        self.stays = 0
        self._lock = threading.Lock()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._open = []
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        for sock in [self._listener, *self._open]:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._listener.close()

    def _serve(self):
        while True:
            try:
                front, _ = self._listener.accept()
            except OSError:
                return  # __exit__ shut the listener down
            back = socket.socket(socket.AF_UNIX)
            back.connect(self._target)
            self._open[:] = [front, back]
            pumps = [
                threading.Thread(target=self._pump, args=(front, back, True), daemon=True),
                threading.Thread(target=self._pump, args=(back, front, False), daemon=True),
            ]
            for pump in pumps:
                pump.start()
            for pump in pumps:
                pump.join()
            front.close()
            back.close()
            self.stays += 1

    def _pump(self, source, target, from_frontend):
        try:
            while (message := _receive(source)) is not None:
                data, fds = message
                request, _, _ = HEADER.unpack_from(data)
                with self._lock:
                    self.entries.append(Entry(self.stays, from_frontend, request, data[HEADER.size :]))
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
                try:
                    sent = target.sendmsg([data], rights)
                    target.sendall(data[sent:])
                finally:
                    for fd in fds:
                        os.close(fd)
        except OSError:
            pass  # either side may vanish at any moment; the other is told below
        finally:
            for sock in (source, target):
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def starts_and_stops(self, ring=0, stay=0):
        """What happened to `ring`: "start" for each kick fd, ("stop", last_avail_idx) for each GET_VRING_BASE reply."""
        story = []
        for entry in self.entries:
            if entry.stay != stay:
                continue
            if entry.from_frontend and entry.request == SET_VRING_KICK:
                (index,) = struct.unpack("=Q", entry.payload)
                if index & 0xFF == ring:
                    story.append("start")
            elif not entry.from_frontend and entry.request == GET_VRING_BASE:
                index, num = struct.unpack("=II", entry.payload)
                if index == ring:
                    story.append(("stop", num))
        return story


def _receive(sock):
    data, fds = b"", []
    wanted = HEADER.size
    while len(data) < wanted:
        chunk, ancillary, _, _ = sock.recvmsg(wanted - len(data), socket.CMSG_SPACE(64))
        for _, _, payload in ancillary:
            fds.extend(array.array("i", payload))
        if not chunk:
            return None
        data += chunk
        if len(data) == HEADER.size:
            wanted += HEADER.unpack(data)[2]
    return data, fds
