"""Vrings that lack a translation, and a back-end channel on which nobody can be asked for it."""

import asyncio
import contextlib
import socket
import struct
import time

import pytest

from tests.mock import frontend as fe
from tests.mock.blk_driver import IN, IOERR, OK, BlkDriver
from tests.vvupipe.vhost_user.test_session_errors import BackEnd
from vvupipe.errors import Disconnected, WorkerError
from vvupipe.vhost_user.back_end_channel import BackendChannel
from vvupipe.vhost_user.messages import BackendRequest
from vvupipe.vhost_user.socket_transport import MessageSocket

pytestmark = pytest.mark.timeout(60)

PROTOCOL = fe.MQ | fe.REPLY_ACK | fe.CONFIG | fe.BACKEND_REQ | fe.MEM_SLOTS
FEATURES = fe.F_VERSION_1 | fe.F_PROTOCOL_FEATURES | fe.F_ACCESS_PLATFORM
UPDATE, INVALIDATE = 2, 3


@contextlib.contextmanager
def with_iommu(back_end):
    """A front-end whose driver's addresses are guest-physical ones, of which the back-end knows nothing."""
    with contextlib.closing(fe.Frontend(back_end.socket)) as frontend:
        frontend.negotiate(FEATURES, PROTOCOL)
        frontend.set_memory(back_end.memory)
        yield frontend


def tell(frontend, kind, gpa, size, uva=0):
    assert frontend.ask_u64(fe.IOTLB_MSG, struct.pack("=QQQBB6x", gpa, size, uva, 3, kind)) == 0


def tell_all(frontend, memory):
    for gpa, size, uva, _, _ in memory.regions:
        tell(frontend, UPDATE, gpa, size, uva)


def start(frontend, ring, index=0):
    frontend.tell(fe.SET_VRING_NUM, struct.pack("=II", index, ring.size))
    frontend.tell(fe.SET_VRING_ADDR, struct.pack("=IIQQQQ", index, 0, ring.desc, ring.used, ring.avail, 0))
    frontend.tell(fe.SET_VRING_CALL, struct.pack("=Q", index), [ring.call_fd])
    frontend.tell(fe.SET_VRING_KICK, struct.pack("=Q", index), [ring.kick_fd])
    frontend.enable(index, 1)


def play(back_end, story):
    asyncio.run(back_end.play(story))


def answer(frontend, channel, back_end):
    """Answer what is asked on the channel: the vring is served then."""
    request, _, _ = channel.receive()
    tell_all(frontend, back_end.memory)
    channel.acknowledge(request)
    assert BlkDriver(back_end.ring).read(2, 512) == back_end.content[1024:1536]


@contextlib.contextmanager
def useless_channel(frontend, kind):
    """A back-end channel that takes no messages: it is closed, or whoever has the other end does not read."""
    near, far = socket.socketpair()
    with far:
        with near:
            frontend.tell(fe.SET_BACKEND_REQ_FD, b"", [near.fileno()])
        if kind == "closed":
            far.close()
        else:
            far.shutdown(socket.SHUT_RD)
        time.sleep(0.1)
        yield


@pytest.mark.parametrize("kind", ["closed", "deaf"])
def test_channel_that_takes_no_messages_is_tried_once(tmp_path, caplog, kind):
    """The vring waits, at no cost, and is served when there is another channel."""

    def story(back_end):
        with with_iommu(back_end) as frontend, useless_channel(frontend, kind):
            start(frontend, back_end.ring)
            time.sleep(0.5)
            asked = [record for record in caplog.records if "cannot be asked" in record.message]
            assert len(asked) == 1
            channel = frontend.open_channel()
            answer(frontend, channel, back_end)
            channel.close()

    play(BackEnd(tmp_path), story)
    assert not [record for record in caplog.records if record.exc_info]


def test_translation_to_memory_that_is_gone_is_asked_for(tmp_path):
    """To know it does not help: nobody tells a vring to look at it for ever."""

    def story(back_end):
        back_end.memory.close()
        back_end.memory.__init__([(0, 8 << 20), (64 << 20, 1 << 20)])
        ring = back_end.ring
        with with_iommu(back_end) as frontend:
            channel = frontend.open_channel()
            tell_all(frontend, back_end.memory)
            start(frontend, ring)
            disk = BlkDriver(ring)
            gpa, size, uva, _, offset = back_end.memory.regions[1]
            frontend.tell(fe.REM_MEM_REG, struct.pack("=QQQQQ", 0, gpa, size, uva, offset))
            disk.memory.pack("<IIQ", disk.header, IN, 0, 8)
            disk.submit([(disk.header, 16, False), (gpa, 512, True), (disk.status, 1, True)])
            request, _, body = channel.receive()
            assert struct.unpack_from("=Q", body) == (gpa,)
            channel.acknowledge(request, 1)
            assert disk.finish()[0] == IOERR
            assert disk.read(2, 512) == back_end.content[1024:1536]
            channel.close()

    play(BackEnd(tmp_path), story)


def test_workers_that_cannot_be_told(tmp_path, caplog):
    def story(back_end):
        with with_iommu(back_end) as frontend:
            channel = frontend.open_channel()
            pool = back_end.device.pool
            change = pool.change_translations

            async def failing(**changes):
                raise WorkerError("it did not answer")

            pool.change_translations = failing
            start(frontend, back_end.ring)
            request, _, _ = channel.receive()
            channel.acknowledge(request, 1)
            time.sleep(0.3)
            pool.change_translations = change
            tell_all(frontend, back_end.memory)
            assert BlkDriver(back_end.ring).request(IN, size=512)[0] == OK
            channel.close()

    play(BackEnd(tmp_path), story)
    assert not [record for record in caplog.records if record.exc_info]
    assert "vring 0 goes on waiting" in caplog.text


def test_acknowledgement_of_a_wrong_size_ends_the_channel():
    async def story():
        ours, theirs = socket.socketpair()
        channel = BackendChannel(MessageSocket(theirs), acks=True)
        with ours:
            asking = asyncio.ensure_future(channel.request(BackendRequest.CONFIG_CHANGE_MSG))
            await asyncio.sleep(0.05)
            ours.sendall(fe.HEADER.pack(BackendRequest.CONFIG_CHANGE_MSG, 1 | fe.REPLY, 4) + bytes(4))
            async with asyncio.timeout(10):
                with pytest.raises(Disconnected):
                    await asking
        await channel.close()

    asyncio.run(story())


def test_ring_that_could_not_start_says_nothing_of_the_next_front_end(tmp_path):
    """Which has no IOMMU, though the vring that was refused had one."""

    def story(back_end):
        with with_iommu(back_end) as frontend:
            tell_all(frontend, back_end.memory)
            back_end.ring.desc += 8  # misaligned
            with pytest.raises(fe.Refused):
                start(frontend, back_end.ring, 1)
            back_end.ring.desc -= 8
        with back_end.frontend() as frontend:
            frontend.start_vring(0, back_end.ring)
            assert BlkDriver(back_end.ring).read(2, 512) == back_end.content[1024:1536]

    play(BackEnd(tmp_path, num_queues=2), story)


def test_channel_that_is_replaced_while_it_is_asked(tmp_path):
    """Nobody answers on the former one: the new one is asked."""

    def story(back_end):
        with with_iommu(back_end) as frontend:
            former = frontend.open_channel()
            start(frontend, back_end.ring)
            former.receive()
            channel = frontend.open_channel()
            answer(frontend, channel, back_end)
            former.close()
            channel.close()

    play(BackEnd(tmp_path), story)


def test_channel_that_is_replaced_while_it_is_notified(tmp_path):
    """What was not acknowledged on the former one is told on the new one, and all that comes after it."""

    def story(back_end):
        with contextlib.closing(fe.Frontend(back_end.socket)) as frontend:
            plain = fe.F_VERSION_1 | fe.F_PROTOCOL_FEATURES
            frontend.negotiate(plain, PROTOCOL | fe.INBAND)
            frontend.set_memory(back_end.memory)
            former = frontend.open_channel()
            ring = back_end.ring
            frontend.tell(fe.SET_VRING_NUM, struct.pack("=II", 0, ring.size))
            frontend.set_addresses(0, ring)
            frontend.tell(fe.SET_VRING_KICK, struct.pack("=Q", 0), [ring.kick_fd])
            frontend.enable(0, 1)
            disk = BlkDriver(ring)
            assert submit_read(disk) == former.receive()[0] == fe.CHANNEL_CALL
            channel = frontend.open_channel()
            for _ in range(2):
                request, _, _ = channel.receive()
                assert request == fe.CHANNEL_CALL
                channel.acknowledge(request)
                submit_read(disk)
            former.close()
            channel.close()

    play(BackEnd(tmp_path), story)


def submit_read(disk):
    disk.memory.pack("<IIQ", disk.header, IN, 0, 8)
    disk.submit([(disk.header, 16, False), (disk.buffer, 512, True), (disk.status, 1, True)])
    return fe.CHANNEL_CALL
