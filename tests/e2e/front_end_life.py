"""The front-end library on a back-end that runs: its image, connect, negotiate, memory, vrings, a mock driver behind.

The driver's side blocks, so it runs in a thread while the library's loop goes on.
"""

import asyncio
import contextlib
import json
import os
import socket
import struct
import subprocess
import time

from backends import vvupipe_command

from tests.mock import frontend as wire
from tests.mock.blk_driver import BlkDriver
from tests.mock.driver_ring import DriverRing
from tests.mock.guest_memory import GuestMemory
from tests.mock.packed_ring import PackedRing
from vvupipe.memory.region import MemoryRegion
from vvupipe.vhost_user.frontend import Frontend
from vvupipe.vhost_user.messages import ProtocolFeature

PLAIN = wire.F_VERSION_1 | wire.F_INDIRECT | wire.F_BLK_FLUSH
USUAL = PLAIN | wire.F_EVENT_IDX | wire.F_BLK_MQ | wire.F_BLK_CONFIG_WCE | wire.F_BLK_DISCARD | wire.F_BLK_WRITE_ZEROES
PACKED_START = 0x8000_8000  # both positions at slot 0, both wrap counters set
IN_BAND = ProtocolFeature.INBAND_NOTIFICATIONS
CONFIG_BYTES = 60  #: struct virtio_blk_config up to the write-zeroes fields (virtio 1.2, 5.2.4)
WCE_OFFSET = 32
SECTOR = 512


class Life:
    """A connection that is negotiated, and guest memory that it does not know of yet."""

    def __init__(self, frontend, layout):
        self.frontend = frontend
        self.memory = GuestMemory(layout)
        self.regions = [MemoryRegion(*region[:5]) for region in self.memory.regions]
        self._rings = []

    def offers(self, feature):
        """Whether the back-end offers a protocol feature or (a plain number) a feature."""
        if isinstance(feature, ProtocolFeature):
            return feature in self.frontend.offered_protocol_features
        return bool(self.frontend.features & feature)

    def ring(self, size=16):
        """A vring of the negotiated layout, and its driver."""
        taken = self.frontend.taken_features
        kind = PackedRing if taken & wire.F_PACKED else DriverRing
        ring = kind(self.memory, size, event_idx=bool(taken & wire.F_EVENT_IDX))
        self._rings.append(ring)
        return ring, Disk(BlkDriver(ring))

    async def place(self, ring, index=0, *, base=None, to_uva=None, log_gpa=None):
        """SET_VRING_NUM, _ADDR, _BASE."""
        to_uva = to_uva or self.memory.to_uva
        await self.frontend.set_vring_num(index, ring.size)
        await self.frontend.set_vring_addr(
            index,
            descriptor_uva=to_uva(ring.desc),
            available_uva=to_uva(ring.avail),
            used_uva=to_uva(ring.used),
            log_gpa=log_gpa,
        )
        fresh = PACKED_START if isinstance(ring, PackedRing) else 0
        await self.frontend.set_vring_base(index, fresh if base is None else base)

    async def start(self, ring, index=0, **place):
        """All of a vring's set-up, with eventfds."""
        await self.place(ring, index, **place)
        await self.frontend.set_vring_err(index, ring.err_fd)
        await self.frontend.set_vring_call(index, ring.call_fd)
        await self.frontend.set_vring_kick(index, ring.kick_fd)
        await self.frontend.set_vring_enable(index, True)

    def close(self):
        for ring in self._rings:
            ring.close()
        self.memory.close()


class Disk:
    """The mock driver's requests, awaited; counts them."""

    def __init__(self, driver):
        self.driver = driver
        self.requests = 0

    async def read(self, sector, size):
        return await self._in_thread(self.driver.read, sector, size)

    async def write(self, sector, data):
        await self._in_thread(self.driver.write, sector, data)

    async def flush(self):
        await self._in_thread(self.driver.flush)

    async def request(self, *arguments, **named):
        """(status, data, used length)"""
        return await self._in_thread(self.driver.request, *arguments, **named)

    async def _in_thread(self, work, *arguments, **named):
        self.requests += 1
        return await asyncio.to_thread(work, *arguments, **named)


@contextlib.asynccontextmanager
async def living(socket_path, features=USUAL, protocol=~IN_BAND, layout=((0, 4 << 20), (1 << 30, 4 << 20))):
    """A Life with those of the features and protocol features that the back-end offers."""
    frontend = await Frontend.connect(socket_path, 30, lambda line: None)
    life = None
    try:
        # Every protocol feature, also those without a name, but for what is left out.
        await frontend.get_protocol_features()
        await frontend.set_protocol_features(ProtocolFeature(frontend.offered_protocol_features & protocol))
        await frontend.set_owner()
        await frontend.set_features(features & frontend.features)
        life = Life(frontend, layout)
        yield life
    finally:
        await frontend.close()
        if life:
            life.close()


async def until(condition, timeout_s=10):
    """Wait until `condition()`; AssertionError when it does not come."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.005)


class Served:
    """A back-end that runs, its image, and what the image must contain."""

    def __init__(self, name, backend, image):
        self.name, self.backend, self.image = name, backend, image
        self.content = bytearray(image.read_bytes())

    @property
    def is_ours(self):
        return self.name.startswith("vvupipe")

    def life(self, *arguments, **named):
        return living(self.backend.socket, *arguments, **named)

    def resize(self, size_bytes):
        if self.is_ours:
            command = vvupipe_command("device", "resize", self.image, str(size_bytes))
            subprocess.run(command, check=True, timeout=30, env={**os.environ})
        else:
            qmp(self.backend.socket.with_suffix(".qmp"), "block_resize", {"node-name": "disk", "size": size_bytes})
        self.content = self.content.ljust(size_bytes, b"\0")


def qmp(path, command, arguments):
    """One command on a monitor of QEMU's."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(str(path))
        with sock.makefile("rw") as stream:
            assert "QMP" in json.loads(stream.readline())
            for request in ({"execute": "qmp_capabilities"}, {"execute": command, "arguments": arguments}):
                stream.write(json.dumps(request) + "\n")
                stream.flush()
                while "event" in (answer := json.loads(stream.readline())):
                    pass
                assert "return" in answer, answer


def storage_daemon_version():
    """(major, minor)"""
    said = subprocess.run(["qemu-storage-daemon", "--version"], capture_output=True, text=True, check=True).stdout
    return tuple(int(part) for part in said.split()[2].split(".")[:2])


def run(work):
    async def with_limit():
        async with asyncio.timeout(60):
            await work

    asyncio.run(with_limit())


def capacity(space):
    return struct.unpack_from("<Q", space)[0] * SECTOR


async def write(served, disk, sector, data):
    await disk.write(sector, data)
    served.content[sector * SECTOR : sector * SECTOR + len(data)] = data
