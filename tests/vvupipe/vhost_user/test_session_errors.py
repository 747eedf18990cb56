"""What a session does when Linux refuses what a message takes: an error of that message, and the back-end goes on."""

import asyncio
import contextlib
import errno
import gc
import os
import struct
import time

import pytest

from tests.mock import frontend as fe
from tests.mock.blk_driver import BlkDriver
from tests.mock.driver_ring import DriverRing
from tests.mock.guest_memory import GuestMemory
from tests.mock.packed_ring import PackedRing
from tests.vvupipe.vhost_user.frontend_kit import open_fds
from vvupipe.devices.block.device import BlockDevice
from vvupipe.devices.block.image import open_image
from vvupipe.errors import UserError
from vvupipe.vhost_user import backend, socket_transport
from vvupipe.vhost_user.socket_transport import SocketTransport
from vvupipe.workers import pool

pytestmark = pytest.mark.timeout(60)

IMAGE_BYTES = 1 << 20
NO_ACKS = fe.MQ | fe.CONFIG
WRITEBACK = 32  # its place in the configuration space


class BackEnd:
    """A block device that serves one front-end after the other in this process; front-ends live in a thread."""

    def __init__(self, folder, num_queues=1):
        self.num_queues = num_queues
        path = folder / "disk.img"
        path.write_bytes(os.urandom(IMAGE_BYTES))
        self.content = path.read_bytes()
        self.socket = folder / "blk.sock"
        self.image = open_image(path, read_only=False, lock=False)
        self.memory = GuestMemory()
        self.ring = DriverRing(self.memory)

    @contextlib.contextmanager
    def frontend(self, protocol=fe.MQ | fe.REPLY_ACK | fe.CONFIG):
        connection = fe.Frontend(self.socket)
        try:
            connection.negotiate(protocol=protocol)
            connection.set_memory(self.memory)
            yield connection
        finally:
            connection.close()

    def check_reads(self, frontend, *, start=True):
        """Read, on the vring that is started before."""
        if start:
            frontend.start_vring(0, self.ring)
        assert BlkDriver(self.ring).read(2, 512) == self.content[1024:1536]
        frontend.stop_vring(0)

    async def _serve(self, device, transport):
        while True:
            await backend.serve(await transport.accept(), device)

    async def play(self, story):
        cpus = sorted(os.sched_getaffinity(0))[:1]
        self.device = device = BlockDevice(self.image, cpus, self.num_queues, 256, 50_000)
        transport = SocketTransport.listen(self.socket)
        await device.start()
        serving = asyncio.create_task(self._serve(device, transport))
        telling = asyncio.create_task(asyncio.to_thread(story, self))
        try:
            await asyncio.wait([serving, telling], return_when=asyncio.FIRST_COMPLETED)
            assert not serving.done(), serving.exception()
            await telling
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            transport.close()
            await device.close()
            self.memory.close()
            self.ring.close()


def play(folder, story):
    asyncio.run(BackEnd(folder).play(story))


@pytest.fixture
def useless():
    """A file descriptor that is good for nothing but its path."""
    fd = os.open("/tmp", os.O_PATH)
    yield fd
    os.close(fd)


class Failing:
    """A function that raises an error while `on`."""

    def __init__(self, function, error):
        self.function, self.error, self.on, self.calls = function, error, False, 0

    def __call__(self, *arguments, **options):
        self.calls += 1
        if self.on:
            raise self.error
        return self.function(*arguments, **options)


def fds():
    """How many fds are open, without those of what nobody holds any more."""
    gc.collect()
    return open_fds()


def ends(frontend):
    with pytest.raises(ConnectionError):
        frontend.receive()


def test_useless_kick_is_refused(tmp_path, useless):
    def story(back_end):
        with back_end.frontend() as frontend:
            before = fds()
            with pytest.raises(fe.Refused):
                frontend.tell(fe.SET_VRING_KICK, struct.pack("=Q", 0), [useless])
            assert fds() == before
            back_end.check_reads(frontend)

    play(tmp_path, story)


def test_useless_kick_ends_the_session_and_the_next_front_end_is_served(tmp_path, useless, caplog):
    def story(back_end):
        with back_end.frontend(NO_ACKS) as frontend:
            frontend.tell(fe.SET_VRING_KICK, struct.pack("=Q", 0), [useless])
            ends(frontend)
        with back_end.frontend() as frontend:
            back_end.check_reads(frontend)

    play(tmp_path, story)
    told = [record.getMessage() for record in caplog.records if "dropped" in record.message]
    assert told == ["front-end dropped: SET_VRING_KICK: Bad file descriptor"]


@pytest.mark.parametrize("which", [fe.SET_VRING_CALL, fe.SET_VRING_ERR])
def test_useless_doorbells_harm_nobody_else(tmp_path, useless, which):
    """A worker that rings one learns nothing, and a vring that cannot start tells nobody."""

    def story(back_end):
        with back_end.frontend() as frontend:
            frontend.start_vring(0, back_end.ring, enable=False)
            frontend.tell(which, struct.pack("=Q", 0), [useless])
            with contextlib.closing(GuestMemory([(1 << 40, 1 << 20)])) as elsewhere:
                frontend.set_memory(elsewhere)
            with pytest.raises(fe.Refused):
                frontend.enable(0, 1)
        with back_end.frontend() as frontend:
            back_end.check_reads(frontend)

    play(tmp_path, story)


def test_too_many_open_files(tmp_path, monkeypatch):
    dup = Failing(os.dup, OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
    monkeypatch.setattr(os, "dup", dup)

    def story(back_end):
        with back_end.frontend() as frontend:
            frontend.start_vring(0, back_end.ring, enable=False)
            before = fds()
            dup.on = True
            with pytest.raises(fe.Refused):
                frontend.enable(0, 1)
            dup.on = False
            assert fds() == before
            frontend.enable(0, 1)
            before = fds()
            dup.on = True
            with pytest.raises(fe.Refused):
                frontend.tell(fe.SET_VRING_CALL, struct.pack("=Q", 0), [back_end.ring.call_fd])
            dup.on = False
            assert fds() == before
            back_end.check_reads(frontend, start=False)

    play(tmp_path, story)


def test_no_room_for_an_inflight_region(tmp_path, monkeypatch):
    create = Failing(pool.create_unnamed, UserError("no room"))
    monkeypatch.setattr(pool, "create_unnamed", create)

    def story(back_end):
        with back_end.frontend() as frontend:
            frontend.start_vring(0, back_end.ring, enable=False)
            before = fds()
            create.on = True
            with pytest.raises(fe.Refused):
                frontend.enable(0, 1)
            assert back_end.ring.broken(5)
            assert fds() == before
            create.on = False
            frontend.enable(0, 1)
            back_end.check_reads(frontend, start=False)

    play(tmp_path, story)


def test_no_room_for_the_inflight_region_of_a_front_end(tmp_path, monkeypatch):
    """Its answer would have to bring a file."""
    create = Failing(None, UserError("no room"))
    create.on = True
    monkeypatch.setattr(socket_transport, "create_unnamed", create)

    def story(back_end):
        with back_end.frontend(fe.MQ | fe.REPLY_ACK | fe.INFLIGHT_SHMFD) as frontend:
            frontend.send(fe.GET_INFLIGHT_FD, struct.pack("=QQHH", 0, 0, 1, 16))
            ends(frontend)
        with back_end.frontend() as frontend:
            back_end.check_reads(frontend)

    play(tmp_path, story)


@pytest.mark.parametrize("acks", [True, False])
def test_write_cache_that_cannot_be_written_when_it_is_turned_off(tmp_path, monkeypatch, acks):
    """The driver is told, later writes go through, and the next attempt does not believe in the first."""
    sync = Failing(lambda fd: None, OSError(errno.EIO, os.strerror(errno.EIO)))
    monkeypatch.setattr(os, "fdatasync", sync)
    off = struct.pack("=III", WRITEBACK, 1, 0) + b"\0"

    def story(back_end):
        with back_end.frontend(fe.MQ | fe.CONFIG | (fe.REPLY_ACK if acks else 0)) as frontend:
            assert frontend.get_config(WRITEBACK, 1) == b"\1"
            sync.on = True
            if not acks:
                frontend.tell(fe.SET_CONFIG, off)
                ends(frontend)
                return
            for attempt in (1, 2):
                with pytest.raises(fe.Refused):
                    frontend.tell(fe.SET_CONFIG, off)
                assert (sync.calls, frontend.get_config(WRITEBACK, 1)) == (attempt, b"\0")
            sync.on = False
            for _ in range(2):
                frontend.tell(fe.SET_CONFIG, off)
                assert sync.calls == 3
            back_end.check_reads(frontend)

    play(tmp_path, story)


WITH_STATE = fe.MQ | fe.REPLY_ACK | fe.CONFIG | fe.DEVICE_STATE


def begin_load(frontend, state):
    theirs, ours = os.pipe()
    frontend.send(fe.SET_DEVICE_STATE_FD, struct.pack("=II", 1, 0), [theirs])
    os.close(theirs)
    with open(ours, "wb") as pipe:
        pipe.write(state)


@pytest.mark.parametrize("state", [b"[" * 50_000, b"1" * 5000, b"\xff", b"[]"], ids=["deep", "long", "no text", "list"])
def test_device_state_that_is_broken_is_an_error_of_that_transfer(tmp_path, state):
    def story(back_end):
        with back_end.frontend(WITH_STATE) as frontend:
            begin_load(frontend, state)
            frontend.receive()
            assert frontend.ask_u64(fe.CHECK_DEVICE_STATE) == 1
            back_end.check_reads(frontend)

    play(tmp_path, story)


def test_device_state_after_which_nobody_asks(tmp_path, caplog):
    def story(back_end):
        with back_end.frontend(WITH_STATE) as frontend:
            for _ in range(2):
                begin_load(frontend, b"nonsense")
                frontend.receive()
                time.sleep(0.2)
            back_end.check_reads(frontend)

    play(tmp_path, story)
    gc.collect()
    assert not [record for record in caplog.records if record.exc_info]


def test_front_end_that_leaves_as_soon_as_a_transfer_begins(tmp_path):
    """The back-end finds the end of the connection before the transfer's first step."""

    def story(back_end):
        before = fds()
        for _ in range(5):
            with back_end.frontend(WITH_STATE) as frontend:
                begin_load(frontend, b"{}")
        with back_end.frontend() as frontend:
            back_end.check_reads(frontend)
        deadline = time.monotonic() + 10
        while fds() != before:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    play(tmp_path, story)


def test_kick_that_is_refused_leaves_the_ring_as_it_is(tmp_path, useless):
    def story(back_end):
        with back_end.frontend() as frontend:
            frontend.start_vring(0, back_end.ring)
            for kick in ([], [useless]):
                with pytest.raises(fe.Refused):
                    frontend.tell(fe.SET_VRING_KICK, struct.pack("=Q", 0), kick)
            back_end.check_reads(frontend, start=False)

    play(tmp_path, story)


def test_in_band_notifications_that_end_before_they_began(tmp_path):
    """Messages in one go: the back-end takes the next one before anything else."""
    in_band = fe.MQ | fe.REPLY_ACK | fe.CONFIG | fe.BACKEND_REQ | fe.INBAND | fe.INFLIGHT_SHMFD
    no_bell = fe.HEADER.pack(fe.SET_VRING_ERR, 1, 8) + struct.pack("=Q", 0x100)
    refused = fe.HEADER.pack(fe.SET_VRING_KICK, 1 | fe.NEED_REPLY, 8) + struct.pack("=Q", 0x100)

    def story(back_end):
        with back_end.frontend(in_band) as frontend:
            region = os.memfd_create("inflight")
            os.ftruncate(region, 4096)
            frontend.tell(fe.SET_INFLIGHT_FD, struct.pack("=QQHH4x", 4096, 0, 1, 2), [region])
            os.close(region)
            frontend.tell(fe.SET_VRING_NUM, struct.pack("=II", 0, back_end.ring.size))
            frontend.set_addresses(0, back_end.ring)
            frontend.tell(fe.SET_VRING_CALL, struct.pack("=Q", 0), [back_end.ring.call_fd])
            frontend.enable(0, 1)
            before = fds()
            frontend.sock.sendall((refused + no_bell) * 10)
            for _ in range(10):
                frontend.receive()
            time.sleep(0.3)
            assert fds() <= before

    play(tmp_path, story)


def test_inflight_region_of_another_layout(tmp_path):
    """It was given before the features: what the front-end did not say is its region stays as it is."""
    split_bytes = 4160  # 256 entries

    def story(back_end):
        with back_end.frontend(fe.MQ | fe.REPLY_ACK | fe.CONFIG | fe.INFLIGHT_SHMFD) as frontend:
            region = os.memfd_create("inflight")
            os.ftruncate(region, 1 << 16)
            payload = struct.pack("=QQHH4x", split_bytes, 0, 1, 256)
            frontend.tell(fe.SET_INFLIGHT_FD, payload, [region])
            frontend.tell(fe.SET_FEATURES, struct.pack("=Q", fe.F_VERSION_1 | fe.F_PROTOCOL_FEATURES | fe.F_PACKED))
            with pytest.raises(fe.Refused):
                frontend.start_vring(0, PackedRing(back_end.memory, 256), base=PackedRing.START)
            assert not any(os.pread(region, 1 << 16, split_bytes))
            os.close(region)

    play(tmp_path, story)
