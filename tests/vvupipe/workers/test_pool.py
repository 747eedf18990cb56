"""Worker processes under the pool: pinned, commanded, replaced, ended."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from kernels.control_block import VRING_BROKEN
from kernels.status import ERR_MEMORY_GONE
from tests.mock.blk_batch import BlkBatch
from tests.mock.blk_driver import IN, OK, OUT, BlkDriver
from tests.mock.driver_ring import DriverRing
from tests.mock.guest_memory import GuestMemory
from tests.mock.packed_ring import PackedRing
from tests.vvupipe.workers.pool_kit import in_scene, read, until
from vvupipe.errors import WorkerError
from vvupipe.memory.doorbell import Doorbell
from vvupipe.memory.region import MemoryRegion
from vvupipe.workers.vring_setup import VringSetup

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(1 << 20))
    return path


def test_workers_start_when_needed_are_pinned_and_end(image):
    pids = []

    async def story(scene):
        await scene.pool.start()
        assert len(scene.pool.pids()) == 1
        await scene.give_memory()
        for index in range(2):
            disk = BlkDriver(DriverRing(scene.memory))
            await scene.pool.start_vring(scene.setup(index, disk.ring))
            assert await read(disk, index) == image.read_bytes()[index * 512 : index * 512 + 512]
        pids.extend(scene.pool.pids())
        assert len(pids) == scene.pool.num_workers
        assert [psutil.Process(pid).cpu_affinity() for pid in pids] == [[cpu] for cpu in scene.pool.cpus]

    in_scene(image, story)
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


def test_killed_worker_goes_on_where_it_stopped(image):
    async def story(scene):
        await scene.give_memory()
        disk = BlkDriver(DriverRing(scene.memory))
        await scene.pool.start_vring(scene.setup(0, disk.ring))
        for round_number in range(3):
            await read(disk, round_number)
            (pid,) = scene.pool.pids()
            os.kill(pid, signal.SIGKILL)
            assert await read(disk, 7) == image.read_bytes()[7 * 512 : 8 * 512]
            assert scene.pool.pids() != [pid]
        assert await scene.pool.stop_vring(0) == 6
        assert scene.pool.block.counters(0).requests == 6

    in_scene(image, story)


def test_command_is_given_to_the_new_worker_when_the_old_one_dies(image):
    async def story(scene):
        await scene.give_memory()
        disk = BlkDriver(DriverRing(scene.memory))
        await scene.pool.start_vring(scene.setup(0, disk.ring))
        await read(disk, 0)
        os.kill(scene.pool.pids()[0], signal.SIGKILL)
        assert await scene.pool.stop_vring(0) == 1

    in_scene(image, story)


def test_worker_that_keeps_dying_is_given_up(image):
    async def story(scene):
        await scene.pool.start()
        deadline = time.monotonic() + 60
        while not scene.pool.failed.done() and time.monotonic() < deadline:
            for pid in scene.pool.pids():
                os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(0.05)
        assert "died 5 times" in str(scene.pool.failed.result())

    in_scene(image, story)


def files_of(scene):
    """How many fds and mappings the first worker has."""
    process = Path(f"/proc/{scene.pool.pids()[0]}")
    return len(list((process / "fd").iterdir())), (process / "maps").read_text().count("vvupipe-")


def test_ring_outside_of_memory_is_refused_and_its_driver_told(image):
    async def story(scene):
        await scene.pool.start()
        await scene.give_memory()
        ring = DriverRing(scene.memory)
        before = files_of(scene)
        with pytest.raises(WorkerError, match="outside of guest memory"):
            await scene.pool.start_vring(scene.setup(0, ring, used_uva=0x1000))
        assert ring.broken(1)
        assert files_of(scene) == before, "it is nobody's any more"

    in_scene(image, story)


def test_counters_survive_a_stop(image):
    async def story(scene):
        await scene.give_memory()
        disk = BlkDriver(DriverRing(scene.memory))
        for expected in (1, 2):
            await scene.pool.start_vring(scene.setup(0, disk.ring))
            await read(disk, 0)
            await scene.pool.stop_vring(0)
            assert scene.pool.block.counters(0).requests == expected
            assert scene.pool.block.counters(0).read_bytes == 512 * expected

    in_scene(image, story)


def test_image_that_shrinks_gives_errors_and_no_death(image):
    async def story(scene):
        await scene.give_memory()
        disk = BlkDriver(DriverRing(scene.memory))
        await scene.pool.start_vring(scene.setup(0, disk.ring))
        await read(disk, 100)
        os.truncate(image, 4096)
        status, _, _ = await asyncio.to_thread(disk.request, 0, 100, size=512)
        assert status == 1
        assert await read(disk, 1) == image.read_bytes()[512:1024]
        assert not scene.pool._slots[0].deaths

    in_scene(image, story)


def test_image_that_shrinks_under_several_requests_at_once(image):
    """They are copied together, and only those behind the end fail."""

    async def story(scene):
        await scene.give_memory()
        ring = DriverRing(scene.memory)
        disks = [BlkDriver(ring) for _ in range(4)]
        await scene.pool.start_vring(scene.setup(0, ring))
        await read(disks[0], 100)
        os.truncate(image, 4096)
        sectors = [100, 0, 104, 1]
        heads = []
        for disk, sector in zip(disks, sectors, strict=True):
            scene.memory.pack("<IIQ", disk.header, 0, 0, sector)
            heads.append(ring.put_chain([(disk.header, 16, False), (disk.buffer, 512, True), (disk.status, 1, True)]))
        ring.make_available(*heads)
        ring.kick()
        for _ in heads:
            await asyncio.to_thread(ring.wait_used)
        assert [scene.memory.read(disk.status, 1)[0] for disk in disks] == [1, 0, 1, 0]
        content = image.read_bytes()
        assert [scene.memory.read(disk.buffer, 512) for disk in disks[1::2]] == [content[:512], content[512:1024]]
        assert not scene.pool._slots[0].deaths

    in_scene(image, story)


@pytest.mark.parametrize("engine", ["mmap", "sync"])
@pytest.mark.parametrize("kind", [IN, OUT])
def test_guest_memory_without_a_page(image, engine, kind):
    """What is to be read or written is lost: no answer, the ring is broken; once started again it is served."""
    content = image.read_bytes()

    async def story(scene):
        await scene.give_memory()
        ring = DriverRing(scene.memory)
        batch = BlkBatch(ring)
        await scene.pool.start_vring(scene.setup(0, ring))
        fd, size = scene.memory.regions[0][3], os.fstat(scene.memory.regions[0][3]).st_size
        lost = size - 4096
        request = batch.put(kind, 8, b"W" * 512 if kind == OUT else b"", 0 if kind == OUT else 512, lost)
        os.ftruncate(fd, lost)
        request.room = 0  # nobody can look there
        batch.show()
        await until(lambda: scene.pool.block.vrings["state"][0] == VRING_BROKEN)
        assert scene.pool.block.vrings["error"][0] == ERR_MEMORY_GONE
        batch.look()
        assert request.status is None, "nobody may believe that it is done"
        os.ftruncate(fd, size)
        await scene.pool.stop_vring(0)
        again = BlkBatch(DriverRing(scene.memory))
        await scene.pool.start_vring(scene.setup(0, again.ring))
        request = again.put(IN, 16, size=512, buffer=lost)
        again.show()
        await asyncio.to_thread(again.wait)
        assert request.status == OK
        assert scene.memory.read(lost, 512) == content[16 * 512 : 17 * 512]

    in_scene(image, story, engine=engine)


def test_idle_worker_uses_no_cpu(image):
    async def story(scene):
        await scene.give_memory()
        disk = BlkDriver(DriverRing(scene.memory))
        await scene.pool.start_vring(scene.setup(0, disk.ring))
        await read(disk, 0)
        await asyncio.sleep(0.2)
        process = psutil.Process(scene.pool.pids()[0])
        before = sum(process.cpu_times()[:2])
        await asyncio.sleep(1)
        assert sum(process.cpu_times()[:2]) - before <= 0.02

    in_scene(image, story)


def test_coordinator_that_is_killed_leaves_no_worker(image, tmp_path):

    socket = tmp_path / "s.sock"
    command = [sys.executable, "-m", "vvupipe", "device", "block", "--file", image, "--socket", socket, "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    workers = [child.pid for child in psutil.Process(process.pid).children()]
    assert workers
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not [pid for pid in workers if psutil.pid_exists(pid)]
    process.stdout.close()


def without_pages(scene):
    """Take every page of the guest's memory away."""
    os.ftruncate(scene.memory.regions[0][3], 0)


def test_memory_that_was_truncated_is_no_reason_to_end(image):
    """A new worker cannot map it: its vrings are broken, and those of other memory are served."""

    async def story(scene):
        await scene.give_memory()
        ring = DriverRing(scene.memory)
        await scene.pool.start_vring(scene.setup(0, ring))
        (pid,) = scene.pool.pids()
        without_pages(scene)
        os.kill(pid, signal.SIGKILL)
        await until(lambda: scene.pool.pids() not in ([pid], []))
        assert await asyncio.to_thread(ring.broken, 5)
        await scene.pool.stop_vring(0)
        with pytest.raises(WorkerError, match="outside of guest memory"):
            await scene.pool.start_vring(scene.setup(0, ring))
        scene.memory.close()
        scene.memory = GuestMemory()
        await scene.give_memory()
        disk = BlkDriver(DriverRing(scene.memory))
        await scene.pool.start_vring(scene.setup(0, disk.ring))
        assert await read(disk, 3) == image.read_bytes()[3 * 512 : 4 * 512]
        assert not scene.pool.failed.done()

    in_scene(image, story, num_vrings=1)


def test_worker_that_makes_way_has_not_died(image):
    """A front-end that truncates its memory again and again harms nobody but itself."""

    async def story(scene):
        await scene.give_memory()
        size = os.fstat(scene.memory.regions[0][3]).st_size
        for _ in range(6):
            ring = DriverRing(scene.memory)
            await scene.pool.start_vring(scene.setup(0, ring))
            without_pages(scene)
            os.eventfd_write(ring.kick_fd, 1)
            await until(lambda: scene.pool.block.vrings["state"][0] == VRING_BROKEN)
            os.truncate(scene.memory.regions[0][3], size)
            await scene.pool.stop_vring(0)
        disk = BlkDriver(DriverRing(scene.memory))
        await scene.pool.start_vring(scene.setup(0, disk.ring))
        assert await read(disk, 3) == image.read_bytes()[3 * 512 : 4 * 512]
        assert not scene.pool.failed.done()

    in_scene(image, story, num_vrings=1)


def test_memory_that_has_no_pages_for_a_new_worker_either(image, tmp_path):
    """Where the one vring's start finds that out, the other's must not have worker after worker make way."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4k", "none", folder]
    if subprocess.run(mount, capture_output=True, timeout=20, check=False).returncode:
        pytest.skip("cannot mount here")
    (folder / "filler").write_bytes(bytes(4096))
    size = 1 << 20

    async def story(scene):
        fd = os.open(folder / "ram", os.O_RDWR | os.O_CREAT)
        os.ftruncate(fd, size)
        await scene.pool.set_memory([MemoryRegion(0, size, 0, fd, 0)])
        for index in range(2):
            part = index << 16
            setup = VringSetup(
                index, 16, part, part + 4096, part + 8192, event_idx=False, indirect=False, write_through=False
            )
            with contextlib.suppress(WorkerError):
                await scene.pool.start_vring(setup)
        assert not scene.pool.failed.done()

    try:
        in_scene(image, story, num_vrings=2, num_workers=1)
    finally:
        subprocess.run(["umount", "-l", folder], timeout=20, check=True)


def test_doorbell_of_no_use_of_a_ring_that_breaks(image):
    """Its memory goes, which nobody can be told of: the other ring of the worker moves to where the memory is now."""

    async def story(scene):
        scene.memory.close()
        scene.memory = GuestMemory([(0, 1 << 20), (1 << 32, 1 << 20)])
        await scene.give_memory()
        useless = os.open("/tmp", os.O_PATH)
        first = DriverRing(scene.memory)
        await scene.pool.start_vring(scene.setup(0, first, err=Doorbell(useless)))
        scene.memory._next = (1 << 32) + 0x1000
        disk = BlkDriver(DriverRing(scene.memory))
        await scene.pool.start_vring(scene.setup(1, disk.ring))
        (pid,) = scene.pool.pids()
        ((gpa, size, uva, fd, offset),) = scene.memory.regions[1:]
        await scene.pool.set_memory([MemoryRegion(gpa, size, uva, os.dup(fd), offset)])
        assert scene.pool.block.vrings["state"][0] == VRING_BROKEN
        assert await read(disk, 3) == image.read_bytes()[3 * 512 : 4 * 512]
        assert scene.pool.pids() == [pid]

    in_scene(image, story, num_vrings=2, num_workers=1)


@pytest.mark.parametrize("kind", [DriverRing, PackedRing])
def test_position_of_a_ring_whose_memory_a_new_worker_does_not_find(image, kind):
    """It goes on from there when the memory is back."""

    async def story(scene):
        await scene.give_memory()
        ring = kind(scene.memory)
        disk, packed = BlkDriver(ring), kind is PackedRing
        base = PackedRing.START if packed else 0
        await scene.pool.start_vring(scene.setup(0, ring, packed=packed, base=base))
        for sector in range(3):
            await read(disk, sector)
        (pid,) = scene.pool.pids()
        await scene.pool.set_memory([])
        os.kill(pid, signal.SIGKILL)
        await until(lambda: scene.pool.pids() not in ([pid], []))
        position = await scene.pool.stop_vring(0)
        assert position == (ring.position() if packed else ring.avail_idx)
        await scene.give_memory()
        await scene.pool.start_vring(scene.setup(0, ring, packed=packed, base=position))
        assert await read(disk, 5) == image.read_bytes()[5 * 512 : 6 * 512]

    in_scene(image, story, num_vrings=1)
