"""The front-end's end of the back-end channel: what comes, what is done about it, what is answered."""

import asyncio
import socket
import struct

import pytest

from tests.mock import frontend as wire
from tests.vvupipe.vhost_user.frontend_kit import EVERYTHING, files, on_back_end, open_fds
from vvupipe.errors import ProtocolError, Refused
from vvupipe.vhost_user.frontend_channel import ChannelHandlers

pytestmark = pytest.mark.timeout(60)

ACCESS_FAIL, MISS = 4, 1


class BackendEnd:
    """The back-end's end of the channel."""

    def __init__(self, fd):
        self.sock = socket.socket(fileno=fd)
        self.sock.settimeout(10)

    async def send(self, request, payload=b"", fds=(), flags=1):
        data = wire.HEADER.pack(request, flags, len(payload)) + payload
        await asyncio.to_thread(socket.send_fds, self.sock, [data], list(fds))

    async def ask(self, request, payload=b"", fds=()):
        """Send a request that wants a reply; its code."""
        await self.send(request, payload, fds, 1 | wire.NEED_REPLY)
        answer = await asyncio.to_thread(self.sock.recv, 20, socket.MSG_WAITALL)
        answered, flags, size, code = struct.unpack("=IIIQ", answer)
        assert (answered, flags, size) == (request, 1 | wire.REPLY, 8)
        return code


def on_channel(work, handlers, protocol=EVERYTHING):
    """Run `work(channel, back-end's end, front-end)` on a channel that is open."""

    async def main(frontend, peer):
        asking = asyncio.create_task(frontend.open_channel(handlers))
        request, flags, payload, (fd,) = await asyncio.to_thread(peer.receive)
        assert (request, payload) == (21, b"")
        if flags & wire.NEED_REPLY:
            peer.send(21, bytes(8))
        end = BackendEnd(fd)
        peer.forget_fds()
        try:
            return await work(await asking, end, frontend)
        finally:
            end.sock.close()

    return on_back_end(main, protocol)


def recording(heard, **failing):
    """Handlers that note what they hear; `failing` names those that raise."""

    def handler(name):
        async def handle(*values):
            heard.append((name, *values))
            if name in failing:
                raise failing[name]

        return handle

    names = ("iotlb_miss", "iotlb_access_fail", "config_change", "vring_call", "vring_err")
    return ChannelHandlers(**{name: handler(name) for name in names})


def iotlb(iova, access, kind, size=1):
    return struct.pack("=QQQBB6x", iova, size, 0, access, kind)


REQUESTS = [
    (1, iotlb(0x5000, 2, MISS), ("iotlb_miss", 0x5000, 2)),
    (1, iotlb(0x5000, 1, MISS)[:26], ("iotlb_miss", 0x5000, 1)),
    (1, iotlb(0x5000, 3, ACCESS_FAIL), ("iotlb_access_fail", 0x5000, 3)),
    (2, b"", ("config_change",)),
    (4, struct.pack("=II", 3, 0), ("vring_call", 3)),
    (5, struct.pack("=II", 1, 0), ("vring_err", 1)),
]


def test_requests_reach_their_handlers_and_are_answered():
    heard = []

    async def work(channel, end, frontend):
        return [await end.ask(request, payload) for request, payload, _ in REQUESTS]

    assert on_channel(work, recording(heard)) == [0] * len(REQUESTS)
    assert heard == [expected for *_, expected in REQUESTS]


@pytest.mark.parametrize("protocol", [EVERYTHING, EVERYTHING & ~(wire.REPLY_ACK | wire.INBAND)])
def test_who_does_not_ask_gets_no_answer(protocol):
    """Nor does anybody when REPLY_ACK was not negotiated; what is answered after it shows that nothing came before."""
    heard = []

    async def work(channel, end, frontend):
        acks = bool(protocol & wire.REPLY_ACK)
        for request, payload, _ in REQUESTS:
            await end.send(request, payload, flags=1 if acks else 1 | wire.NEED_REPLY)
        if acks:
            return await end.ask(2)
        end.sock.shutdown(socket.SHUT_WR)
        await channel.closed
        return len(await asyncio.to_thread(end.sock.recv, 100))

    assert on_channel(work, recording(heard), protocol) == 0
    assert [name for name, *_ in heard[: len(REQUESTS)]] == [expected[0] for *_, expected in REQUESTS]


@pytest.mark.parametrize(
    ("request_number", "payload"),
    [
        (1, b""),
        (1, iotlb(0, 1, MISS) + b"\0"),
        (1, iotlb(0, 1, 2)),
        (1, iotlb(0, 1, 99)),
        (2, b"\0"),
        (3, bytes(24)),
        (4, b""),
        (5, bytes(12)),
        (6, bytes(16)),
        (999, b""),
    ],
)
def test_what_makes_no_sense_fails_and_the_channel_goes_on(request_number, payload):
    heard = []

    async def work(channel, end, frontend):
        codes = [await end.ask(request_number, payload)]
        assert not heard
        return [*codes, await end.ask(2)]

    assert on_channel(work, recording(heard)) == [1, 0]


def test_nobody_handles_it():
    async def work(channel, end, frontend):
        return [await end.ask(request, payload) for request, payload, _ in REQUESTS]

    assert on_channel(work, ChannelHandlers()) == [1] * len(REQUESTS)


@pytest.mark.parametrize("error", [Refused("no such address"), ProtocolError("no")])
def test_a_handler_that_fails(error):
    heard = []

    async def work(channel, end, frontend):
        return [await end.ask(1, iotlb(0, 1, MISS)), await end.ask(2)]

    assert on_channel(work, recording(heard, iotlb_miss=error)) == [1, 0]


def test_fds_that_nobody_needs_are_closed():
    async def work(channel, end, frontend):
        before = open_fds()
        assert await end.ask(2, b"", fds) == 1
        assert open_fds() == before
        return True

    with files(2) as fds:
        assert on_channel(work, recording([]))


@pytest.mark.parametrize("raw", [b"\0" * 12, struct.pack("=III", 2, 1, 5000), struct.pack("=IIIQ", 2, 5, 8, 0)])
def test_a_broken_channel_ends_and_the_connection_does_not(raw):
    async def work(channel, end, frontend):
        await asyncio.to_thread(end.sock.sendall, raw)
        reason = await channel.closed
        assert not await asyncio.to_thread(end.sock.recv, 100), "the back-end sees the end"
        assert not frontend.closed.done()
        return reason

    assert on_channel(work, recording([]))


def test_the_back_end_closes_its_channel():
    async def work(channel, end, frontend):
        end.sock.close()
        return await channel.closed

    assert on_channel(work, recording([])) == "the back-end closed its channel"


def test_a_new_channel_takes_the_place_of_the_old_one():
    heard = []

    async def main(frontend, peer):
        ends = []
        for _ in range(2):
            asking = asyncio.create_task(frontend.open_channel(recording(heard)))
            *_, (fd,) = await asyncio.to_thread(peer.receive)
            peer.send(21, bytes(8))
            ends.append(BackendEnd(fd))
            peer.forget_fds()
            await asking
        old, new = ends
        assert not await asyncio.to_thread(old.sock.recv, 100)
        code = await new.ask(2)
        for end in ends:
            end.sock.close()
        return code

    assert on_back_end(main) == 0
    assert heard == [("config_change",)]


def test_a_refused_channel_is_closed():
    async def main(frontend, peer):
        asking = asyncio.create_task(frontend.open_channel(ChannelHandlers()))
        *_, (fd,) = await asyncio.to_thread(peer.receive)
        peer.send(21, struct.pack("=Q", 1))
        with pytest.raises(Refused, match="SET_BACKEND_REQ_FD"):
            await asking
        with socket.socket(fileno=fd) as end:
            peer.forget_fds()
            return await asyncio.to_thread(end.recv, 100)

    assert on_back_end(main) == b""
