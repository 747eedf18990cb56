import asyncio
import os
import resource
import select
import socket
import stat
import struct

import pytest

from tests.mock import frontend as fe
from vvupipe import fd_socket
from vvupipe.errors import Disconnected, ProtocolError, TransportError, UserError
from vvupipe.vhost_user.messages import Message, ProtocolFeature
from vvupipe.vhost_user.payloads import pack_u64
from vvupipe.vhost_user.socket_transport import SocketConnection, SocketTransport


def run(coroutine):
    async def limited():
        async with asyncio.timeout(10):
            return await coroutine

    return asyncio.run(limited())


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    theirs.settimeout(10)
    peer = fe.Frontend.__new__(fe.Frontend)
    peer.sock = theirs
    connection = SocketConnection(ours)
    yield connection, peer
    connection.close()
    theirs.close()


@pytest.fixture
def memfd():
    fd = os.memfd_create("region")
    os.ftruncate(fd, 1 << 16)
    yield fd
    os.close(fd)


def table(*regions):
    return struct.pack("=II", len(regions), 0) + b"".join(struct.pack("=QQQQ", *region) for region in regions)


def test_message_with_its_fds_and_the_answer(pair, memfd):
    connection, peer = pair
    peer.send(fe.SET_VRING_CALL, pack_u64(3), [memfd, memfd], flags=9)
    message = run(connection.receive())
    assert (message.name, message.payload, message.need_reply, len(message.fds)) == (
        "SET_VRING_CALL",
        pack_u64(3),
        True,
        2,
    )
    assert all(os.fstat(fd).st_ino == os.fstat(memfd).st_ino for fd in message.fds)
    message.close_fds()
    run(connection.send(message.reply(pack_u64(0))))
    assert peer.receive() == (fe.SET_VRING_CALL, 5, pack_u64(0))


def test_message_in_pieces(pair):
    connection, peer = pair
    whole = struct.pack("=IIIQ", fe.SET_FEATURES, 1, 8, 77)

    async def test():
        receiving = asyncio.create_task(connection.receive())
        for k in range(len(whole)):
            peer.sock.sendall(whole[k : k + 1])
            await asyncio.sleep(0)
        return await receiving

    assert run(test()).payload == pack_u64(77)


def test_messages_that_are_there_already_leave_others_their_turn(pair):
    connection, peer = pair
    for _ in range(50):
        peer.send(fe.GET_FEATURES)
    turns = 0

    async def other():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def test():
        waiting = asyncio.create_task(other())
        for _ in range(50):
            assert (await connection.receive()).request == fe.GET_FEATURES
        waiting.cancel()

    run(test())
    assert turns >= 50


def test_orderly_end_and_end_in_the_middle(pair):
    connection, peer = pair
    peer.sock.sendall(struct.pack("=III", 1, 1, 8) + b"abc")
    peer.sock.shutdown(socket.SHUT_WR)
    with pytest.raises(Disconnected):
        run(connection.receive())
    assert run(connection.receive()) is None


@pytest.mark.parametrize("header", [struct.pack("=III", 1, 2, 0), struct.pack("=III", 1, 1, 5000)])
def test_header_that_is_not_possible(pair, header):
    connection, peer = pair
    peer.sock.sendall(header)
    with pytest.raises(ProtocolError):
        run(connection.receive())


def test_more_fds_than_any_message_has(pair, memfd):
    connection, peer = pair
    open_before = len(os.listdir("/proc/self/fd"))
    peer.send(fe.SET_MEM_TABLE, b"", [memfd] * 9)
    with pytest.raises(ProtocolError, match="9 file descriptors"):
        run(connection.receive())
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_send_to_one_who_left(pair):
    connection, peer = pair
    peer.sock.close()
    with pytest.raises(Disconnected):
        run(connection.send(Message(1, b"x")))


def test_regions_take_their_fds_in_order(pair, memfd):
    connection, _ = pair
    other = os.memfd_create("other")
    os.ftruncate(other, 8192)
    message = Message(
        fe.SET_MEM_TABLE, table((0, 4096, 7, 4096), (1 << 32, 8192, 9, 0)), fds=[os.dup(memfd), os.dup(other)]
    )
    first, second = run(connection.memory_regions(message))
    assert (first.gpa, first.size_bytes, first.uva, first.fd_offset) == (0, 4096, 7, 4096)
    assert os.fstat(second.fd).st_ino == os.fstat(other).st_ino
    assert message.fds == []
    first.close()
    second.close()
    os.close(other)


@pytest.mark.parametrize(
    ("regions", "fds"),
    [([(0, 4096, 0, 0)], 0), ([(0, 4096, 0, 0)], 2), ([(0, 1 << 17, 0, 0)], 1), ([(0, 4096, 0, 1 << 16)], 1), ([], 0)],
)
def test_regions_that_do_not_fit_their_fds(pair, memfd, regions, fds):
    message = Message(fe.SET_MEM_TABLE, table(*regions), fds=[os.dup(memfd) for _ in range(fds)])
    with pytest.raises(ProtocolError):
        run(pair[0].memory_regions(message))
    assert len(message.fds) == fds  # still the message's, which closes them
    message.close_fds()


def test_region_beyond_any_file_is_refused_whatever_its_fd_is(pair):
    message = Message(fe.SET_MEM_TABLE, table((0, 4096, 0, 1 << 63)), fds=[os.open("/dev/null", os.O_RDWR)])
    with pytest.raises(ProtocolError, match="where no file ends"):
        run(pair[0].memory_regions(message))
    message.close_fds()


def test_bit_8_means_that_no_fd_comes(pair):
    connection, _ = pair
    message = Message(fe.SET_VRING_KICK, pack_u64(0x100))
    assert connection.kick(message) is connection.call(message) is connection.err(message) is None
    with pytest.raises(ProtocolError, match="without the file descriptor"):
        connection.kick(Message(fe.SET_VRING_KICK, pack_u64(0)))


def test_kick_does_not_block_and_call_rings(pair):
    connection, _ = pair
    eventfd = os.eventfd(0)
    kick = connection.kick(Message(fe.SET_VRING_KICK, pack_u64(0), fds=[os.dup(eventfd)]))
    with pytest.raises(BlockingIOError):
        os.eventfd_read(kick)
    call = connection.call(Message(fe.SET_VRING_CALL, pack_u64(0), fds=[os.dup(eventfd)]))
    call.ring()
    assert os.eventfd_read(eventfd) == 1
    call.close()
    os.close(kick)
    os.close(eventfd)


def test_protocol_features(pair):
    assert pair[0].protocol_features == ProtocolFeature(~0), "a socket carries everything"


def test_shut_down_wakes_a_pending_receive(pair):
    connection, _ = pair

    async def test():
        receiving = asyncio.create_task(connection.receive())
        await asyncio.sleep(0.01)
        connection.shut_down()
        return await receiving

    assert run(test()) is None


def test_listening_socket_is_private_and_goes_with_its_owner(tmp_path):
    path = tmp_path / "s.sock"
    transport = SocketTransport.listen(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert transport.describe() == f"socket {path}"
    transport.close()
    transport.close()
    assert not path.exists()


def test_front_ends_one_after_another(tmp_path):
    path = tmp_path / "s.sock"
    transport = SocketTransport.listen(path)

    async def test():
        for number in (1, 2):
            accepting = asyncio.create_task(transport.accept())
            await asyncio.sleep(0)
            peer = fe.Frontend(path)
            peer.send(number)
            connection = await accepting
            assert (await connection.receive()).request == number
            connection.close()
            assert not select.select([peer.sock], [], [], 5)[0] or peer.sock.recv(1) == b""
            peer.close()

    run(test())
    transport.close()


def test_front_end_for_whom_no_file_can_be_opened_has_to_wait(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(fd_socket, "_ACCEPT_AGAIN_S", 0.02)
    transport = SocketTransport.listen(tmp_path / "s.sock")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def test():
        peer = fe.Frontend(tmp_path / "s.sock")
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
        try:
            accepting = asyncio.create_task(transport.accept())
            await asyncio.sleep(0.1)
            assert not accepting.done()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        (await asyncio.wait_for(accepting, 5)).close()
        peer.close()

    run(test())
    transport.close()
    assert "a front-end has to wait: Too many open files" in caplog.text


def test_path_in_use(tmp_path):
    path = tmp_path / "s.sock"
    transport = SocketTransport.listen(path)
    with pytest.raises(UserError, match="in use by another process"):
        SocketTransport.listen(path)
    transport.close()


def test_stale_socket_file_is_replaced(tmp_path):
    path = tmp_path / "s.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    SocketTransport.listen(path).close()


@pytest.mark.parametrize("name", ["missing/s.sock", "x" * 200])
def test_path_that_cannot_be(tmp_path, name):
    with pytest.raises(UserError, match="cannot listen"):
        SocketTransport.listen(tmp_path / name)


def test_file_that_is_no_socket_stays(tmp_path):
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(UserError, match="cannot listen"):
        SocketTransport.listen(path)
    assert path.read_text() == "data"


def test_inherited_connected_socket_serves_once():
    ours, theirs = socket.socketpair()
    transport = SocketTransport.from_fd(ours.fileno())
    connection = run(transport.accept())
    with pytest.raises(TransportError, match="has served its front-end"):
        run(transport.accept())
    connection.close()
    transport.close()
    ours.close()
    theirs.close()


def test_inherited_listening_socket(tmp_path):
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "s.sock"))
    listening.listen()
    transport = SocketTransport.from_fd(listening.fileno())
    peer = fe.Frontend(tmp_path / "s.sock")
    run(transport.accept()).close()
    peer.close()
    transport.close()
    assert (tmp_path / "s.sock").exists()  # its owner removes it
    listening.close()


def test_fd_that_is_no_socket(tmp_path):
    with open(tmp_path / "f", "w") as file, pytest.raises(UserError, match=f"--fd {file.fileno()}"):
        SocketTransport.from_fd(file.fileno())
    with pytest.raises(UserError, match="--fd 999"):
        SocketTransport.from_fd(999)
    with socket.socket(socket.AF_INET) as inet, pytest.raises(UserError, match="UNIX"):
        SocketTransport.from_fd(inet.fileno())


@pytest.mark.parametrize("which", ["call", "err", "log_event"])
def test_doorbell_whose_counter_is_full_blocks_nobody(pair, which):
    eventfd = os.eventfd((1 << 32) - 1)
    os.eventfd_write(eventfd, (1 << 64) - (1 << 32) - 1)
    bell = getattr(pair[0], which)(Message(fe.SET_VRING_CALL, pack_u64(0), fds=[os.dup(eventfd)]))
    bell.ring()
    bell.close()
    os.close(eventfd)


def test_peer_that_never_pauses_leaves_others_their_turn(pair):
    connection, peer = pair
    peer.sock.sendall(fe.HEADER.pack(fe.SET_OWNER, 1, 0) * 100)

    async def test():
        loop = asyncio.get_running_loop()
        turns = 0

        def turn():
            nonlocal turns
            turns += 1
            loop.call_soon(turn)

        turn()
        for _ in range(100):
            await connection.receive()
        assert turns >= 100

    run(test())
