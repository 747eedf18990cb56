"""The workers of a block device without a front-end: the pool, and a driver's rings in memory."""

import asyncio
import os
import time

from tests.mock.guest_memory import GuestMemory
from vvupipe.devices.block.device import BlockDevice
from vvupipe.devices.block.engine import Engine, choose
from vvupipe.devices.block.image import open_image
from vvupipe.memory.doorbell import Doorbell
from vvupipe.memory.region import MemoryRegion
from vvupipe.workers.vring_setup import VringSetup


class Scene:
    """The pool of a block device on an image, and a guest's memory to serve."""

    def __init__(self, image, num_vrings=2, *, engine=Engine.AUTO, sqpoll=False, direct=False, num_workers=None):
        self.image = open_image(image, read_only=False, direct=direct, lock=False)
        choice = choose(engine, self.image, sqpoll=sqpoll)
        cpus = sorted(os.sched_getaffinity(0))[:num_workers]
        self.pool = BlockDevice(self.image, cpus, num_vrings, 1024, 50_000, engine=choice).pool
        self.memory = GuestMemory()

    async def give_memory(self):
        regions = [MemoryRegion(gpa, size, uva, os.dup(fd), off) for gpa, size, uva, fd, off in self.memory.regions]
        await self.pool.set_memory(regions)

    def setup(self, index, ring, **changes):
        to_uva = self.memory.to_uva
        setup = VringSetup(
            index, ring.size, to_uva(ring.desc), to_uva(ring.avail), to_uva(ring.used),
            event_idx=False, indirect=True, write_through=False, kick_fd=os.dup(ring.kick_fd),
            call=Doorbell(os.dup(ring.call_fd)), err=Doorbell(os.dup(ring.err_fd)),
        )  # fmt: skip
        for name, value in changes.items():
            setattr(setup, name, value)
        return setup

    async def close(self):
        await self.pool.close()
        self.memory.close()
        self.image.close()


def in_scene(image, story, **options):
    async def play():
        scene = Scene(image, **options)
        try:
            await story(scene)
        finally:
            await scene.close()

    asyncio.run(play())


async def read(disk, sector):
    return await asyncio.to_thread(disk.read, sector, 512)


async def until(condition, timeout_s=20):
    """Wait until `condition()` is true."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        await asyncio.sleep(0.01)
