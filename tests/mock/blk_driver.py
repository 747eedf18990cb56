"""virtio-blk requests through a DriverRing, and a fixture-like disk that starts one on a back-end."""

import contextlib

from tests.mock.driver_ring import DriverRing
from tests.mock.frontend import F_EVENT_IDX, F_PACKED, NOT_BY_DEFAULT, Frontend
from tests.mock.guest_memory import GuestMemory
from tests.mock.packed_ring import PackedRing

IN, OUT, FLUSH, GET_ID = 0, 1, 4, 8
OK, IOERR, UNSUPP = 0, 1, 2


class BlkDriver:
    """One request at a time on `ring`; returns (status byte, data, used length)."""

    def __init__(self, ring, indirect=False):
        self.ring, self.memory = ring, ring.memory
        self.put = ring.put_indirect if indirect else ring.put_chain
        self.header = self.memory.allocate(16)
        self.status = self.memory.allocate(1)
        self.buffer = self.memory.allocate(1 << 20, 4096)

    def submit(self, chain):
        self.memory.write(self.status, b"\xee")
        self.ring.make_available(self.put(chain))
        self.ring.kick()

    def finish(self):
        _, length = self.ring.wait_used()
        return self.memory.read(self.status, 1)[0], length

    def request(self, kind, sector=0, data=b"", size=0):
        self.memory.pack("<IIQ", self.header, kind, 0, sector)
        chain = [(self.header, 16, False)]
        if data:
            self.memory.write(self.buffer, data)
            chain.append((self.buffer, len(data), False))
        if size:
            chain.append((self.buffer, size, True))
        chain.append((self.status, 1, True))
        self.submit(chain)
        status, length = self.finish()
        return status, self.memory.read(self.buffer, size), length

    def read(self, sector, size):
        status, data, length = self.request(IN, sector, size=size)
        assert (status, length) == (OK, size + 1)
        return data

    def write(self, sector, data):
        status, _, length = self.request(OUT, sector, data)
        assert (status, length) == (OK, 1)

    def flush(self):
        assert self.request(FLUSH)[0] == OK


@contextlib.contextmanager
def started_disk(path, features=None, size=16, indirect=False, memory=None, index=0):
    """(front-end, BlkDriver) on the back-end at `path`, one vring running."""
    frontend = Frontend(path)
    memory = memory or GuestMemory()
    try:
        offered, _ = frontend.negotiate(features)
        taken = offered & ~NOT_BY_DEFAULT if features is None else features
        kind = PackedRing if taken & F_PACKED else DriverRing
        ring = kind(memory, size, event_idx=bool(taken & F_EVENT_IDX))
        frontend.set_memory(memory)
        frontend.start_vring(index, ring, PackedRing.START if taken & F_PACKED else 0)
        yield frontend, BlkDriver(ring, indirect)
        ring.close()
    finally:
        frontend.close()
        memory.close()
