"""Commands that come while a new worker is brought up: it has them when they are said to be done."""

import asyncio
import os
import signal

import pytest

from kernels import control_block as layout
from kernels.virtio_layout import ACCESS_BOTH
from tests.mock.blk_driver import IN, BlkDriver
from tests.mock.driver_ring import DriverRing
from tests.vvupipe.workers.pool_kit import in_scene, read, until
from vvupipe.errors import WorkerError
from vvupipe.memory.iotlb import Translation
from vvupipe.memory.region import MemoryRegion
from vvupipe.workers.worker_handle import WorkerHandle

pytestmark = pytest.mark.timeout(60)

IMAGE_BYTES = 1 << 20


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(IMAGE_BYTES))
    return path


class Gate:
    """Lets no new worker go on behind its first command of a name until `open` is called."""

    def __init__(self, monkeypatch, name):
        self.closed, self._opened = asyncio.Event(), asyncio.Event()
        command = WorkerHandle.command

        async def slow(handle, fields, *arguments, **options):
            answer = await command(handle, fields, *arguments, **options)
            if fields["op"] == name and not self.closed.is_set():
                self.closed.set()
                await self._opened.wait()
            return answer

        monkeypatch.setattr(WorkerHandle, "command", slow)

    def open(self):
        self._opened.set()


async def started(scene, **changes):
    """A driver whose ring the pool serves."""
    await scene.give_memory()
    disk = BlkDriver(DriverRing(scene.memory))
    await scene.pool.start_vring(scene.setup(0, disk.ring, **changes))
    await read(disk, 0)
    return disk


def state(scene):
    return int(scene.pool.block.vrings[0]["state"])


async def while_brought_up(scene, monkeypatch, name, command):
    """Give a command while a new worker has got no further than its command `name`."""
    gate = Gate(monkeypatch, name)
    os.kill(scene.pool.pids()[0], signal.SIGKILL)
    await gate.closed.wait()
    giving = asyncio.ensure_future(command)
    await asyncio.sleep(0.1)
    assert not giving.done()
    gate.open()
    await giving
    assert len(scene.pool._slots[0].deaths) == 1


@pytest.mark.parametrize("name", ["open", "memory", "start"])
def test_resize(image, monkeypatch, name):
    async def story(scene):
        disk = await started(scene)
        resize = {"name": "resize", "size_bytes": IMAGE_BYTES // 2}
        await while_brought_up(scene, monkeypatch, name, scene.pool.device_command(resize))
        status, _, _ = await asyncio.to_thread(disk.request, IN, 1500, size=512)
        assert status == 1

    in_scene(image, story, num_vrings=1)


@pytest.mark.parametrize("name", ["open", "memory", "start"])
def test_memory_that_goes_away(image, monkeypatch, name):
    async def story(scene):
        await started(scene)
        await while_brought_up(scene, monkeypatch, name, scene.pool.set_memory([]))
        assert state(scene) == layout.VRING_BROKEN

    in_scene(image, story, num_vrings=1)


@pytest.mark.parametrize("name", ["open", "memory", "start"])
def test_memory_that_is_added(image, monkeypatch, name):
    async def story(scene):
        disk = await started(scene)
        more = os.memfd_create("more")
        os.ftruncate(more, 1 << 20)
        regions = [MemoryRegion(gpa, size, uva, os.dup(fd), off) for gpa, size, uva, fd, off in scene.memory.regions]
        regions.append(MemoryRegion(1 << 40, 1 << 20, 1 << 41, more, 0))
        await while_brought_up(scene, monkeypatch, name, scene.pool.set_memory(regions))
        assert await read(disk, 3) == image.read_bytes()[3 * 512 : 4 * 512]

    in_scene(image, story, num_vrings=1)


@pytest.mark.parametrize("name", ["open", "iotlb", "start"])
def test_translation_that_is_invalidated(image, monkeypatch, name):
    async def story(scene):
        ((_, size, uva, _, _),) = scene.memory.regions
        ring = DriverRing(scene.memory)
        disk = BlkDriver(ring)
        await scene.give_memory()
        await scene.pool.change_translations(update=[Translation(0, size, uva, ACCESS_BOTH)])
        addresses = {f"{part}_uva": getattr(ring, part) for part in ("desc", "avail", "used")}
        await scene.pool.start_vring(scene.setup(0, ring, iotlb=True, **addresses))
        await read(disk, 0)
        invalidating = scene.pool.change_translations(invalidate=[(0, size)])
        await while_brought_up(scene, monkeypatch, name, invalidating)
        assert state(scene) == layout.VRING_WAITING

    in_scene(image, story, num_vrings=1)


@pytest.mark.parametrize("name", ["open", "memory", "start"])
def test_dirty_log(image, monkeypatch, name):
    """The new worker marks the new one."""

    async def story(scene):
        disk = await started(scene, log_used=True, log_gpa=0)
        logs = []
        for _ in range(2):
            logs.append(os.memfd_create("log"))
            os.ftruncate(logs[-1], 4096)
        await scene.pool.set_log(os.dup(logs[0]), 4096, 0)
        await while_brought_up(scene, monkeypatch, name, scene.pool.set_log(os.dup(logs[1]), 4096, 0))
        await read(disk, 0)
        assert any(os.pread(logs[1], 4096, 0))
        for fd in logs:
            os.close(fd)

    in_scene(image, story, num_vrings=1)


def test_log_is_off_before_the_new_worker_was_given_the_former_one(image, monkeypatch):
    """Its file is open until then."""

    async def story(scene):
        disk = await started(scene)
        log = os.memfd_create("log")
        os.ftruncate(log, 4096)
        await scene.pool.set_log(log, 4096, 0)
        await while_brought_up(scene, monkeypatch, "memory", scene.pool.set_log(-1, 0, 0))
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(log)
        assert await read(disk, 3) == image.read_bytes()[3 * 512 : 4 * 512]

    in_scene(image, story, num_vrings=1)


def test_worker_dies_between_the_new_regions_and_the_new_table(image, monkeypatch):
    """Its successor has mapped them when the table comes."""

    async def story(scene):
        disk = await started(scene)
        gate = Gate(monkeypatch, "map")
        changing = asyncio.create_task(scene.give_memory())
        await gate.closed.wait()
        (pid,) = scene.pool.pids()
        os.kill(pid, signal.SIGKILL)
        await until(lambda: scene.pool.pids() not in ([], [pid]))
        gate.open()
        await changing
        assert len(scene.pool._slots[0].deaths) == 1
        assert await read(disk, 3) == image.read_bytes()[3 * 512 : 4 * 512]

    in_scene(image, story, num_vrings=1)


def test_command_that_cannot_be_sent_to_a_worker_that_lives(image):
    """Nobody waits for the end of that worker."""

    async def story(scene):
        disk = await started(scene)
        closed = os.memfd_create("closed")
        os.close(closed)
        with pytest.raises(WorkerError, match="Bad file descriptor"):
            await asyncio.wait_for(scene.pool._to_all(({"op": "ping"}, [closed])), 10)
        assert await read(disk, 3) == image.read_bytes()[3 * 512 : 4 * 512]

    in_scene(image, story, num_vrings=1)
