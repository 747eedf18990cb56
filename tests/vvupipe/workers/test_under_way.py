"""Workers that are killed, stopped or given other memory while requests are under way, on a disk that is slow."""

import asyncio
import errno
import os
import random
import signal
import time
from pathlib import Path

import pytest

from kernels.virtio_layout import ACCESS_BOTH, ACCESS_READ
from tests.mock.blk_batch import BlkBatch
from tests.mock.blk_driver import FLUSH, IN, IOERR, OK, OUT
from tests.mock.driver_ring import DriverRing
from tests.mock.packed_ring import PackedRing
from tests.slow_file import FSYNC, READ, WRITE, slow_file
from tests.vvupipe.workers.pool_kit import in_scene, until
from vvupipe.memory.iotlb import Translation
from vvupipe.memory.region import MemoryRegion
from vvupipe.workers import commands
from vvupipe.workers.io_uring import available

pytestmark = pytest.mark.timeout(120)

PAGE = 4096
PAGES = 256
needs_io_uring = pytest.mark.skipif(available() is not None, reason=f"io_uring: {available()}")
ENGINES = [pytest.param("mmap"), pytest.param("uring", marks=needs_io_uring), pytest.param("sync")]


@pytest.fixture
def slow(tmp_path):
    with slow_file(tmp_path / "disk.img", random.Random(5).randbytes(PAGES * PAGE)) as file:
        yield file


@pytest.fixture(params=["split", "packed"])
def packed(request):
    return request.param == "packed"


def play(slow, story, **options):
    async def released(scene):
        try:
            await story(scene)
        finally:
            slow.release()  # a process does not end while it waits for FUSE

    in_scene(slow.path, released, **options)


async def start(scene, packed, size=256):
    """A BlkBatch on a ring that the pool serves."""
    await scene.give_memory()
    ring = (PackedRing if packed else DriverRing)(scene.memory, size)
    base = PackedRing.START if packed else 0
    await scene.pool.start_vring(scene.setup(0, ring, packed=packed, base=base))
    return BlkBatch(ring)


def under_way(scene):
    return int(scene.pool.block.vrings[0]["under_way"])


def put_reads(batch, pages):
    return [batch.put(IN, page * PAGE // 512, size=PAGE) for page in pages]


def check_reads(requests, content):
    for request in requests:
        assert (request.status, request.length) == (OK, PAGE + 1)
        assert request.data == content[request.sector * 512 : request.sector * 512 + PAGE]


async def wait(batch):
    return await asyncio.to_thread(batch.wait)


@pytest.mark.parametrize("engine", ENGINES)
def test_killed_with_many_requests_under_way(slow, packed, engine):
    """What it had done stays done, what it had not is done by its successor, and nothing is used twice."""
    content = bytes(slow.data)

    async def story(scene):
        batch = await start(scene, packed)
        kinds = (READ,) if engine == "sync" else (READ, WRITE)  # sync writes whole pages into the page cache itself
        slow.hold = lambda operation, offset: offset >= PAGES // 2 * PAGE and operation in kinds
        quick = put_reads(batch, range(0, 40, 2))
        late = put_reads(batch, range(PAGES - 60, PAGES, 2))
        writes = [batch.put(OUT, page * 8, bytes([page]) * PAGE) for page in (150, 152, 154)]
        batch.show()
        await asyncio.to_thread(slow.wait_held, 3)
        await until(lambda: batch.look() is not None and all(request.status == OK for request in quick))
        (pid,) = scene.pool.pids()
        os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(0.1)
        slow.release()
        await wait(batch)
        assert scene.pool.pids() != [pid]
        check_reads(quick + late, content)
        assert {request.status for request in writes} == {OK}
        os.fdatasync(scene.image.fd)
        for page in (150, 152, 154):
            assert slow.data[page * PAGE : (page + 1) * PAGE] == bytes([page]) * PAGE
        await asyncio.sleep(0.05)
        assert not batch.look(), "nothing comes twice"
        position = await scene.pool.stop_vring(0)
        assert position == (batch.ring.position() if packed else len(quick + late + writes))

    play(slow, story, engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_killed_again_and_again(slow, packed, engine):
    content = bytes(slow.data)
    rng = random.Random(11)

    async def story(scene):
        batch = await start(scene, packed)
        for _ in range(3):
            held = rng.sample(range(PAGES), 30)
            slow.hold = lambda operation, offset, held=held: operation == READ and offset // PAGE in held
            requests = put_reads(batch, rng.sample(range(PAGES), 50))
            batch.show()
            await asyncio.sleep(rng.random() * 0.2)
            for pid in scene.pool.pids():
                os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(rng.random() * 0.1)
            slow.release()
            await wait(batch)
            check_reads(requests, content)
        assert len(batch.done) == 150
        assert not batch.look()

    play(slow, story, engine=engine)


async def hold_reads(slow, batch):
    """Ten reads that the disk does not answer until it is told to."""
    slow.hold = lambda operation, offset: operation == READ
    requests = put_reads(batch, range(3, 33, 3))
    batch.show()
    await asyncio.to_thread(slow.wait_held, 1)
    return requests


@pytest.mark.parametrize("engine", ENGINES)
def test_stop_waits_for_what_is_under_way(slow, packed, engine):
    content = bytes(slow.data)

    async def story(scene):
        batch = await start(scene, packed)
        requests = await hold_reads(slow, batch)
        stopping = asyncio.create_task(scene.pool.stop_vring(0))
        await asyncio.sleep(0.3)
        assert not stopping.done()
        assert len(batch.done) == len(batch.look()) == 0
        slow.release()
        position = await stopping
        # All that was taken is used by now; nothing is touched after this.
        batch.look()
        taken = batch.done
        check_reads(taken, content)
        assert len(taken) == len(requests)
        assert position == (batch.ring.position() if packed else len(requests))

    play(slow, story, engine=engine)


async def kill_half_way(slow, scene, batch):
    """Six reads, of which three are done when the worker dies; then the disk answers. Returns the requests."""
    late = (63, 66, 69)
    slow.hold = lambda operation, offset: operation == READ and offset // PAGE in late
    requests = put_reads(batch, (3, 63, 5, 66, 7, 69))
    batch.show()
    done = len(batch.done)
    await asyncio.to_thread(slow.wait_held, 1)
    await until(lambda: batch.look() is not None and len(batch.done) == done + 3)
    os.kill(scene.pool.pids()[0], signal.SIGKILL)
    await asyncio.sleep(0.05)
    slow.release()
    return requests


def position_of(batch, packed):
    return batch.ring.position() if packed else len(batch.done)


@needs_io_uring
def test_stopped_as_soon_as_its_worker_is_replaced(slow, packed, monkeypatch):
    """What the dead worker had under way is done before the vring stops."""
    content = bytes(slow.data)

    def send(sock, fields, fds=(), send=commands.send):
        send(sock, fields, fds)
        if fields["op"] == "start":  # the new worker finds it before it serves
            send(sock, {"op": "stop", "index": fields["index"], "id": 0})

    async def story(scene):
        batch = await start(scene, packed)
        monkeypatch.setattr(commands, "send", send)
        requests = await kill_half_way(slow, scene, batch)
        position = await scene.pool.stop_vring(0)
        batch.look()
        check_reads(requests, content)
        assert position == position_of(batch, packed)

    play(slow, story, engine="uring", num_vrings=1)


@needs_io_uring
@pytest.mark.parametrize("known", ["nothing", "the ring"])
def test_stopped_while_what_is_to_be_done_again_waits_for_a_translation(slow, packed, known):
    """It tells where it really is, and does them when it starts there again."""
    content = bytes(slow.data)

    async def story(scene):
        await scene.give_memory()
        ring = (PackedRing if packed else DriverRing)(scene.memory, 256)
        ((_, size, uva, _, _),) = scene.memory.regions
        of_ring = Translation(0, scene.memory.allocate(1), uva, ACCESS_BOTH)
        of_all = Translation(0, size, uva, ACCESS_BOTH)
        options = {"packed": packed, "iotlb": True}
        options |= {f"{part}_uva": getattr(ring, part) for part in ("desc", "avail", "used")}
        await scene.pool.change_translations(update=[of_all])
        base = PackedRing.START if packed else 0
        await scene.pool.start_vring(scene.setup(0, ring, base=base, **options))
        batch = BlkBatch(ring)
        # As with an invalidation that comes while the worker dies: the new one has no translations.
        scene.pool._memory.iotlb.clear()
        if known == "the ring":
            scene.pool._memory.iotlb.update(of_ring)
        requests = await kill_half_way(slow, scene, batch)
        await until(scene.pool.waiting)
        position = await scene.pool.stop_vring(0)
        assert position == (ring.position() if packed else 6)
        assert len(batch.under_way) == 3
        await scene.pool.change_translations(update=[of_all])
        started = await scene.pool.start_vring(scene.setup(0, ring, base=position, **options))
        assert (started.last_avail_idx, started.again) == (position, 3)
        await wait(batch)
        check_reads(requests, content)
        assert await scene.pool.stop_vring(0) == position_of(batch, packed)
        assert not batch.look()

    play(slow, story, engine="uring", num_vrings=1)


@needs_io_uring
def test_what_was_left_undone_is_forgotten_when_another_ring_starts(slow):
    """A driver that begins anew gets no answers to what it asked before."""

    async def story(scene):
        await scene.give_memory()
        ring = DriverRing(scene.memory, 256)
        ((_, size, uva, _, _),) = scene.memory.regions
        of_all = Translation(0, size, uva, ACCESS_BOTH)
        options = {"iotlb": True} | {f"{part}_uva": getattr(ring, part) for part in ("desc", "avail", "used")}
        await scene.pool.change_translations(update=[of_all])
        await scene.pool.start_vring(scene.setup(0, ring, **options))
        scene.pool._memory.iotlb.clear()
        await kill_half_way(slow, scene, BlkBatch(ring))
        await until(scene.pool.waiting)
        await scene.pool.stop_vring(0)
        await scene.pool.change_translations(update=[of_all])
        scene.memory.pack("<HH", ring.avail, 0, 0)
        scene.memory.pack("<HH", ring.used, 0, 0)
        started = await scene.pool.start_vring(scene.setup(0, ring, **options))
        assert (started.last_avail_idx, started.again) == (0, 0)

    play(slow, story, engine="uring", num_vrings=1)


@pytest.mark.parametrize("engine", ENGINES)
def test_other_memory_while_requests_are_under_way(slow, packed, engine):
    """The old table stays until they are done; then the ring goes on in the new one."""
    content = bytes(slow.data)

    async def story(scene):
        batch = await start(scene, packed)
        requests = await hold_reads(slow, batch)
        ((gpa, size, uva, fd, offset),) = scene.memory.regions
        more = os.memfd_create("more")
        os.ftruncate(more, 1 << 20)
        regions = [MemoryRegion(gpa, size, uva, os.dup(fd), offset), MemoryRegion(1 << 40, 1 << 20, 1 << 41, more, 0)]
        changing = asyncio.create_task(scene.pool.set_memory(regions))
        await asyncio.sleep(0.3)
        assert not changing.done()
        slow.release()
        await changing
        check_reads(await wait(batch), content)
        requests = put_reads(batch, range(100, 120))
        batch.show()
        await wait(batch)
        check_reads(requests, content)

    play(slow, story, engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("operation", [FSYNC, WRITE])
def test_slow_requests_hold_up_no_reads(slow, packed, engine, operation):
    content = bytes(slow.data)

    async def story(scene):
        batch = await start(scene, packed)
        slow.hold = lambda what, offset: what == operation
        first = batch.put(OUT, 200 * 8, b"w" * PAGE) if operation == WRITE else batch.put(FLUSH)
        batch.show()
        await asyncio.to_thread(slow.wait_held, 1)
        for start_page in (0, 40):
            requests = put_reads(batch, range(start_page, start_page + 40))
            batch.show()
            await until(lambda: batch.look() is not None and len(batch.under_way) == 1)
            check_reads(requests, content)
        assert first.status is None
        slow.release()
        await wait(batch)
        assert first.status == OK

    play(slow, story, engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_flush_that_failed_is_an_error(slow, engine):
    """A second one would find nothing to do, and say that all is well."""

    async def story(scene):
        batch = await start(scene, False)
        batch.put(OUT, 0, b"w" * PAGE)
        batch.show()
        await wait(batch)
        slow.fsync_errors = [errno.EIO]
        request = batch.put(FLUSH)
        batch.show()
        await wait(batch)
        assert request.status == IOERR
        assert slow.fsync_errors == []

    play(slow, story, engine=engine)


@needs_io_uring
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one CPU only")
def test_the_thread_that_takes_submissions_has_a_cpu_of_its_own(slow):
    """Where its worker is, one of the two would wait for the other's time slice to end."""

    async def story(scene):
        await start(scene, False)
        (pid,) = scene.pool.pids()

        def threads():
            tasks = Path(f"/proc/{pid}/task").iterdir()
            return [int(task.name) for task in tasks if (task / "comm").read_text().startswith("iou-sqp")]

        await until(threads)  # it names itself when it runs
        assert os.sched_getaffinity(threads()[0]) == os.sched_getaffinity(0) - os.sched_getaffinity(pid)

    play(slow, story, engine="uring", sqpoll=True)


def test_a_worker_sleeps_while_it_waits_for_the_disk(slow):
    """Requests under way cost no CPU."""

    async def story(scene):
        batch = await start(scene, packed=False)
        slow.hold = lambda operation, offset: operation == READ
        put_reads(batch, [3])
        batch.show()
        await asyncio.to_thread(slow.wait_held, 1)
        await asyncio.sleep(0.2)
        sleeps = int(scene.pool.block.workers[0]["sleeps"])
        before = time.process_time()
        await asyncio.sleep(0.5)
        assert int(scene.pool.block.workers[0]["sleeps"]) - sleeps <= 1
        assert time.process_time() - before < 0.4
        slow.release()
        await wait(batch)

    play(slow, story)


@pytest.mark.parametrize("change", ["elsewhere", "read only", "the same"])
def test_update_that_replaces_a_translation_in_use(slow, change):
    """What is under way is done with the former one before it is said to be gone."""
    content = bytes(slow.data)

    async def story(scene):
        await scene.give_memory()
        ((_, size, uva, _, _),) = scene.memory.regions
        of_all = Translation(0, size, uva, ACCESS_BOTH)
        await scene.pool.change_translations(update=[of_all])
        ring = DriverRing(scene.memory, 256)
        addresses = {f"{part}_uva": getattr(ring, part) for part in ("desc", "avail", "used")}
        await scene.pool.start_vring(scene.setup(0, ring, iotlb=True, **addresses))
        batch = BlkBatch(ring)
        await hold_reads(slow, batch)
        new = {
            "elsewhere": Translation(size - PAGE, PAGE, uva, ACCESS_BOTH),
            "read only": Translation(size - PAGE, PAGE, uva + size - PAGE, ACCESS_READ),
            "the same": Translation(size - PAGE, PAGE, uva + size - PAGE, ACCESS_BOTH),
        }[change]
        changing = asyncio.create_task(scene.pool.change_translations(update=[new]))
        await asyncio.sleep(0.3)
        assert changing.done() == (change == "the same")
        slow.release()
        await changing
        check_reads(await wait(batch), content)

    play(slow, story, num_vrings=1)
