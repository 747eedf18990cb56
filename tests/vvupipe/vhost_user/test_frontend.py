import asyncio
import os
import socket
import struct
import threading
import time

import pytest

from tests.mock import frontend as wire
from tests.mock.blk_backend import ALL_FEATURES, ALL_PROTOCOL, BlkBackend
from vvupipe.errors import Disconnected, NotNegotiated, ProtocolError, UserError
from vvupipe.memory.region import MemoryRegion
from vvupipe.vhost_user.frontend import Frontend
from vvupipe.vhost_user.messages import ProtocolFeature

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "s"


@pytest.fixture
def said():
    return []


def connected(path, work, timeout_s=5.0, say=lambda line: None):
    """Run `work(frontend)` on a connection that is negotiated."""

    async def main():
        frontend = await Frontend.connect(path, timeout_s, say)
        try:
            await frontend.negotiate_protocol(ProtocolFeature(ALL_PROTOCOL))
            return await work(frontend)
        finally:
            await frontend.close()

    return asyncio.run(main())


async def nothing(frontend):
    return frontend.features, frontend.protocol_features


def test_negotiates_what_both_have(path):
    with BlkBackend(path, protocol=ALL_PROTOCOL | 1 << 15 | 1 << 60) as backend:
        features, protocol = connected(path, nothing)
    assert (features, int(protocol)) == (ALL_FEATURES, ALL_PROTOCOL)
    assert backend.taken_protocol == ALL_PROTOCOL
    assert backend.requests[:3] == [wire.GET_FEATURES, wire.GET_PROTOCOL_FEATURES, wire.SET_PROTOCOL_FEATURES]


@pytest.mark.parametrize("protocol", [ALL_PROTOCOL, ALL_PROTOCOL & ~wire.REPLY_ACK])
def test_a_whole_start_and_stop(path, protocol):
    async def work(frontend):
        fds = [os.eventfd(0) for _ in range(3)]
        memory = os.memfd_create("ram")
        os.ftruncate(memory, 1 << 20)
        await frontend.set_features(wire.F_VERSION_1)
        await frontend.set_memory_table([MemoryRegion(0, 1 << 20, 0x7000000, memory, 0)])
        await frontend.set_vring_num(1, 16)
        await frontend.set_vring_addr(1, descriptor_uva=0x7001000, available_uva=0x7002000, used_uva=0x7003000)
        await frontend.set_vring_base(1, 0)
        await frontend.set_vring_err(1, fds[0])
        await frontend.set_vring_call(1, fds[1])
        await frontend.set_vring_kick(1, fds[2])
        await frontend.set_vring_enable(1, True)
        for fd in (*fds, memory):
            os.close(fd)
        return await frontend.get_queue_num(), await frontend.get_config(0, 8), await frontend.get_vring_base(1)

    devices = []
    with BlkBackend(path, protocol=protocol) as backend:
        backend.prepare = devices.append
        queues, capacity, base = connected(path, work)
    assert (queues, struct.unpack("<Q", capacity), base) == (2, (2048,), 0)
    assert backend.taken_features == wire.F_VERSION_1 | wire.F_PROTOCOL_FEATURES
    (device,) = devices
    assert (device.desc, device.avail, device.used_ring, device.size) == (0x1000, 0x2000, 0x3000, 16)
    # Acknowledgements are asked for if and only if they were negotiated.
    assert (wire.SET_MEM_TABLE in backend.need_reply) == bool(protocol & wire.REPLY_ACK)
    starting = [wire.SET_VRING_NUM, wire.SET_VRING_ADDR, wire.SET_VRING_BASE]
    starting += [wire.SET_VRING_ERR, wire.SET_VRING_CALL, wire.SET_VRING_KICK, wire.SET_VRING_ENABLE]
    first = backend.requests.index(wire.SET_VRING_NUM)
    assert backend.requests[first : first + len(starting)] == starting


@pytest.mark.parametrize("request_number", [wire.SET_FEATURES, wire.SET_OWNER])
def test_a_refusal_is_an_error(path, request_number):
    async def work(frontend):
        await frontend.set_features(0)

    backend = BlkBackend(path)
    backend.refused = {request_number}
    with backend, pytest.raises(ProtocolError, match="refused SET_"):
        connected(path, work)


@pytest.mark.parametrize(
    ("answers", "match"),
    [
        ({wire.GET_PROTOCOL_FEATURES: b""}, "8"),
        ({wire.GET_CONFIG: b""}, "refused GET_CONFIG"),
        ({wire.GET_CONFIG: struct.pack("=III", 0, 4, 0) + bytes(4)}, "answered with 4"),
        ({wire.GET_CONFIG: struct.pack("=III", 0, 8, 0) + bytes(4)}, "brings 4"),
        ({wire.GET_QUEUE_NUM: bytes(4)}, "expected 8"),
        ({wire.GET_VRING_BASE: struct.pack("=II", 3, 0)}, "vring 3"),
        ({wire.SET_OWNER: struct.pack("=II", 0, 0)[:4]}, "expected 8"),
    ],
)
def test_senseless_answers(path, answers, match):
    async def work(frontend):
        await frontend.get_queue_num()
        await frontend.get_config(0, 8)
        await frontend.get_vring_base(0)

    backend = BlkBackend(path)
    backend.answers = answers
    with backend, pytest.raises(ProtocolError, match=match):
        connected(path, work)


def test_without_protocol_features_none_are_asked_for(path):
    async def work(frontend):
        await frontend.set_features(wire.F_VERSION_1)
        with pytest.raises(NotNegotiated, match="PROTOCOL_FEATURES"):
            await frontend.set_vring_enable(0, True)
        with pytest.raises(NotNegotiated, match="PROTOCOL_FEATURES"):
            await frontend.get_protocol_features()
        return frontend.protocol_features, await frontend.get_vring_base(0)

    with BlkBackend(path, features=wire.F_VERSION_1) as backend:
        assert connected(path, work) == (0, 0)
    assert backend.requests == [wire.GET_FEATURES, wire.SET_OWNER, wire.SET_FEATURES, wire.GET_VRING_BASE]
    assert backend.taken_features == wire.F_VERSION_1


def test_without_mq_there_is_one_queue(path):
    async def work(frontend):
        return await frontend.get_queue_num()

    with BlkBackend(path, protocol=wire.CONFIG) as backend:
        assert connected(path, work) == 1
    assert wire.GET_QUEUE_NUM not in backend.requests


@pytest.mark.parametrize("raw", [b"\0" * 12, struct.pack("=III", 1, 5, 5000), struct.pack("=III", 2, 5, 8) + bytes(8)])
def test_bytes_that_are_no_answer_end_it(path, raw):
    server = listening(path)

    def serve():
        with server, server.accept()[0] as peer:
            peer.recv(100)
            peer.sendall(raw)
            peer.recv(100)

    with in_thread(serve), pytest.raises(ProtocolError):
        connected(path, nothing)


def test_an_unasked_message_ends_it(path):
    async def main():
        frontend = await Frontend.connect(path, 5, lambda line: None)
        try:
            async with asyncio.timeout(5):
                return await frontend.closed
        finally:
            await frontend.close()

    server = listening(path)

    def serve():
        with server, server.accept()[0] as peer:
            peer.recv(100)
            answer = struct.pack("=IIIQ", 1, 5, 8, 0)
            peer.sendall(answer + answer)
            peer.recv(100)

    with in_thread(serve):
        assert "nobody asked" in asyncio.run(main())


def test_a_disconnect_is_noticed_without_a_request(path):
    async def work(frontend):
        backend_stops = asyncio.to_thread(backend.stop)
        async with asyncio.timeout(5):
            _, reason = await asyncio.gather(backend_stops, frontend.closed)
        with pytest.raises(Disconnected):
            await frontend.get_queue_num()
        return reason

    backend = BlkBackend(path).start()
    assert connected(path, work) == "the back-end closed the connection"


def test_a_disconnect_ends_a_request_that_waits(path):
    async def work(frontend):
        asyncio.get_running_loop().call_later(0.2, threading.Thread(target=backend.stop).start)
        with pytest.raises(Disconnected):
            await frontend.get_queue_num()
        return True

    backend = BlkBackend(path)
    backend.muted = {wire.GET_QUEUE_NUM}
    backend.start()
    assert connected(path, work)


def test_requests_of_several_tasks_take_turns(path):
    async def work(frontend):
        return await asyncio.gather(*(frontend.get_config(offset, 4) for offset in range(0, 32, 4)))

    with BlkBackend(path) as backend:
        parts = connected(path, work)
    assert b"".join(parts) == backend.config()[:32]


def test_waits_for_a_back_end_and_says_so_once(path, said):
    backend = BlkBackend(path)
    threading.Timer(0.5, backend.start).start()
    assert connected(path, nothing, say=said.append)
    backend.stop()
    assert said == [f"waiting for a back-end at {path}"]


def test_waits_for_an_answer_and_says_so_once(path, said):
    """As a VVU proxy whose driver is not there: the connection stands in the listener's queue."""
    server = listening(path)

    def late():
        time.sleep(1.6)
        with server, server.accept()[0] as peer:
            peer.recv(100)
            peer.sendall(struct.pack("=IIIQ", 1, 5, 8, wire.F_PROTOCOL_FEATURES))
            peer.recv(100)

    async def main():
        frontend = await Frontend.connect(path, 10, said.append)
        await frontend.close()
        return frontend.features

    with in_thread(late):
        assert asyncio.run(main()) == wire.F_PROTOCOL_FEATURES
    assert said == [f"connected to {path}, waiting for the back-end to answer"]


def test_a_connection_that_is_closed_unanswered_is_tried_again(path, said):
    server = listening(path)

    def serve():
        with server:
            for _ in range(2):
                server.accept()[0].close()
            with server.accept()[0] as peer:
                peer.recv(100)
                peer.sendall(struct.pack("=IIIQ", 1, 5, 8, 7))
                peer.recv(100)

    async def main():
        frontend = await Frontend.connect(path, 10, said.append)
        await frontend.close()
        return frontend.features

    with in_thread(serve):
        assert asyncio.run(main()) == 7
    assert said == [f"the back-end at {path} closed the connection, trying again"]


@pytest.mark.parametrize("state", ["nothing", "not listening", "silent", "backlog full"])
def test_the_timeout_is_kept(path, state):
    server = socket.socket(socket.AF_UNIX)
    others = []
    if state != "nothing":
        server.bind(str(path))
    if state in ("silent", "backlog full"):
        server.listen(0)
    if state == "backlog full":
        for _ in range(3):
            others.append(socket.socket(socket.AF_UNIX))
            others[-1].setblocking(False)
            try:
                others[-1].connect(str(path))
            except BlockingIOError:
                break
    began = time.monotonic()
    with pytest.raises(UserError, match=r"0\.5"):
        connected(path, nothing, timeout_s=0.5)
    assert 0.4 < time.monotonic() - began < 3
    for sock in (server, *others):
        sock.close()


def test_a_file_is_no_socket(path):
    path.write_text("")
    with pytest.raises(UserError, match="is no socket"):
        connected(path, nothing)


def test_a_path_that_is_too_long(tmp_path):
    with pytest.raises(UserError, match="too long"):
        connected(tmp_path / ("x" * 300), nothing, timeout_s=0.2)


def test_a_path_longer_than_a_socket_address(path):
    folder = path.parent / ("y" * 200)
    folder.mkdir()
    with BlkBackend(path):
        (folder / "s").symlink_to(path)
        assert connected(folder / "s", nothing)


def listening(path):
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen(4)
    return server


class in_thread:
    def __init__(self, work):
        self.thread = threading.Thread(target=work)

    def __enter__(self):
        self.thread.start()

    def __exit__(self, *_):
        self.thread.join(10)
        assert not self.thread.is_alive()
