"""virtio-blk requests by the batch on one ring of tests.mock, which may complete in any order."""

import time
from dataclasses import dataclass

from tests.mock.blk_driver import OK


@dataclass
class Request:
    """One request. data: what is written, or was read. status, length: what the device wrote, None before that."""

    kind: int
    sector: int
    header: int
    buffer: int
    room: int
    status_at: int
    data: bytes = b""
    status: int | None = None
    length: int | None = None


class BlkBatch:
    """`done` has every request that was used, in that order; a head that is not under way is an error."""

    def __init__(self, ring):
        self.ring, self.memory = ring, ring.memory
        self.under_way = {}
        self.done = []
        self._heads = []

    def put(self, kind, sector=0, data=b"", size=0, buffer=None):
        """Write one request; `show` makes it available. size: room for what is read."""
        memory = self.memory
        request = Request(kind, sector, memory.allocate(16), 0, size, memory.allocate(1), data)
        request.buffer = memory.allocate(max(len(data), size, 1), 16) if buffer is None else buffer
        memory.pack("<IIQ", request.header, kind, 0, sector)
        memory.write(request.status_at, b"\xee")
        chain = [(request.header, 16, False)]
        if data:
            memory.write(request.buffer, data)
            chain.append((request.buffer, len(data), False))
        if size:
            chain.append((request.buffer, size, True))
        head = self.ring.put_chain([*chain, (request.status_at, 1, True)])
        assert head not in self.under_way
        self.under_way[head] = request
        self._heads.append(head)
        return request

    def show(self):
        """Make what was put available, and kick."""
        heads, self._heads = self._heads, []
        self.ring.make_available(*heads)
        self.ring.kick()

    def look(self):
        """Take what is used by now. Returns those requests."""
        before = len(self.done)
        while self.ring.used_idx() != self.ring.seen_used:
            self._take()
        return self.done[before:]

    def wait(self, timeout_s=20):
        """Wait until nothing is under way. Raises TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while self.under_way:
            self._take(max(0.01, deadline - time.monotonic()))
        return self.done

    def _take(self, timeout_s=1):
        head, length = self.ring.wait_used(timeout_s)
        request = self.under_way.pop(head)
        request.status, request.length = self.memory.read(request.status_at, 1)[0], length
        if request.room and request.status == OK:
            request.data = self.memory.read(request.buffer, request.room)
        self.done.append(request)
