"""One test for each command and each way to break it; the encoding here is the test's own."""

import contextlib
import errno
import json
import os
import resource
import select
import socket
import struct
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.vvupipe.vfio.server_thread import RawClient
from vvupipe import fd_socket
from vvupipe.errors import WorkerError
from vvupipe.vfio import user_server
from vvupipe.vfio.served_function import Region

EXTENDED = b'{"capabilities":{"max_msg_fds":253,"vvupipe":{"area_fds":true,"doorbell_fds":true,"other":true}}}\0'


def eventfd():
    return os.eventfd(0, os.EFD_NONBLOCK)


def wait_until(condition, timeout_s=10):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_version(client):
    assert struct.unpack("=HH", client.version[:4]) == (0, 1)
    data = json.loads(client.version[4:].rstrip(b"\0"))
    assert data["capabilities"] == {"max_msg_fds": 8, "max_data_xfer_size": 1 << 20, "write_multiple": True}


def test_version_of_our_own_client_gets_the_extensions_that_it_named(server, path):
    client = RawClient(path, EXTENDED)
    data = json.loads(client.version[4:].rstrip(b"\0"))
    assert data["capabilities"]["vvupipe"] == {"area_fds": True, "doorbell_fds": True}
    client.close()


def test_no_more_is_offered_than_by_a_client_without_our_extensions(server, path):
    client = RawClient(path, None)
    body = struct.pack("=HH", 0, 0) + b'{"capabilities":{"max_msg_fds":8}}\0'
    reply = client.ask("VERSION", body)[1]
    assert struct.unpack("=HH", reply[:4]) == (0, 0)
    assert json.loads(reply[4:].rstrip(b"\0"))["capabilities"]["max_msg_fds"] == 8
    client.close()


def test_version_without_data(server, path):
    client = RawClient(path, b"")
    assert client.ask("GET_INFO", struct.pack("=IIII", 16, 0, 0, 0))[0] is None
    client.close()


@pytest.mark.parametrize(
    "payload",
    [b"", struct.pack("=HH", 1, 0), struct.pack("=HH", 0, 1) + b"{", struct.pack("=HH", 0, 1) + b"[]\0",
     struct.pack("=HH", 0, 1) + b'{"capabilities":{"max_msg_fds":"many"}}\0', struct.pack("=HH", 0, 1) + b"[" * 20000],
)  # fmt: skip
def test_version_that_is_not_possible(server, path, payload):
    client = RawClient(path, None)
    assert client.ask("VERSION", payload) == (errno.EINVAL, b"", [])
    client.close()


def test_command_before_version(server, path):
    client = RawClient(path, None)
    assert client.ask("RESET")[0] == errno.EINVAL
    client.close()


def test_second_version(client):
    assert client.ask("VERSION", struct.pack("=HH", 0, 1))[0] == errno.EINVAL


def test_device_info(client):
    error, body, _ = client.ask("GET_INFO", struct.pack("=IIII", 16, 0, 0, 0))
    assert (error, struct.unpack("=IIII", body)) == (None, (16, 3, 9, 5))


def region_info(client, index, argsz=4096):
    error, body, fds = client.ask("GET_REGION_INFO", struct.pack("=IIIIQQ", argsz, 0, index, 0, 0, 0))
    return error, body, fds


def test_region_info_without_our_extension_has_no_areas(client):
    error, body, fds = region_info(client, 4)
    assert (error, fds) == (None, [])
    assert struct.unpack("=IIIIQQ", body) == (32, 3, 4, 0, 1 << 20, 0)
    assert struct.unpack("=IIIIQQ", region_info(client, 1)[1]) == (32, 0, 1, 0, 0, 0)
    assert region_info(client, 9)[0] == errno.EINVAL


def test_region_info_with_our_extension_has_an_fd_for_each_area(server, path):
    client = RawClient(path, EXTENDED)
    _, body, fds = region_info(client, 4)
    argsz, flags, _, cap, size, _ = struct.unpack_from("=IIIIQQ", body)
    assert (argsz, flags, size, len(fds)) == (len(body), 15, 1 << 20, 2)
    kind, version, following = struct.unpack_from("=HHI", body, cap)
    assert (kind, version) == (1, 1)
    assert struct.unpack_from("=IIQQQQ", body, cap + 8) == (2, 0, 0, 8192, 8192, 4096)
    kind, version, end = struct.unpack_from("=HHI", body, following)
    assert (kind, version, end) == (0x7676, 1, 0)
    assert struct.unpack_from("=IIIIQIIQ", body, following + 8) == (2, 0, 0, 0, 0, 1, 0, 4096)
    assert os.pread(fds[1], 6, 4096) == b"area 1"
    for fd in fds:
        os.close(fd)
    client.close()


def test_region_info_tells_how_much_room_its_answer_takes(server, path):
    client = RawClient(path, EXTENDED)
    _, body, fds = region_info(client, 4, argsz=32)
    assert (len(body), fds) == (32, [])
    needed, _, _, cap, _, _ = struct.unpack("=IIIIQQ", body)
    assert (needed, cap) == (32 + 8 + 8 + 32 + 8 + 8 + 32, 0)
    client.close()


def test_io_fds(server, path, client):
    request = struct.pack("=IIII", 4096, 0, 2, 0)
    assert client.ask("GET_REGION_IO_FDS", request)[0] == errno.EOPNOTSUPP
    client.close()
    wait_until(lambda: server.server.client_pid is None)
    client = RawClient(path, EXTENDED)
    error, body, fds = client.ask("GET_REGION_IO_FDS", request)
    assert (error, len(fds)) == (None, 1)
    assert struct.unpack_from("=IIII", body) == (16 + 80, 0, 2, 2)
    assert struct.unpack_from("=QQIIIIQ", body, 16) == (8, 0, 0, 0, 0, 0, 0)
    assert struct.unpack_from("=QQIIIIQ", body, 56) == (12, 4, 0, 0, 0, 0, 0)
    os.eventfd_write(fds[0], 3)
    assert os.eventfd_read(server.function.bell) == 3
    os.close(fds[0])
    assert client.ask("GET_REGION_IO_FDS", struct.pack("=IIII", 4096, 1, 2, 0))[0] == errno.EINVAL
    client.close()


def test_region_access(server, client):
    head = struct.pack("=QII", 16, 0, 4)
    assert client.ask("REGION_WRITE", head + b"abcd") == (None, head, [])
    assert client.ask("REGION_READ", head) == (None, head + b"abcd", [])


@pytest.mark.parametrize(
    ("command", "payload"),
    [
        ("REGION_READ", struct.pack("=QII", 4090, 0, 8)),
        ("REGION_READ", struct.pack("=QII", (1 << 64) - 4, 0, 8)),
        ("REGION_READ", struct.pack("=QII", 0, 0, 0xFFFFFFFF)),
        ("REGION_READ", struct.pack("=QII", 0, 99, 4)),
        ("REGION_READ", struct.pack("=QII", 0, 1, 4)),
        ("REGION_READ", b"short"),
        ("REGION_WRITE", struct.pack("=QII", 4096, 0, 1) + b"x"),
        ("REGION_WRITE", struct.pack("=QII", 0, 0, 5) + b"four"),
        ("REGION_WRITE", b""),
        ("WRITE_MULTI", struct.pack("=Q", 2) + bytes(24)),
        ("WRITE_MULTI", struct.pack("=QQII8s", 1, 0, 0, 9, b"")),
        ("GET_INFO", b""),
        ("GET_IRQ_INFO", struct.pack("=IIII", 16, 0, 5, 0)),
        ("SET_IRQS", b"1234"),
        ("DMA_MAP", bytes(31)),
        ("DMA_UNMAP", bytes(3)),
    ],
)
def test_malformed_request_gets_an_errno_and_the_session_goes_on(client, command, payload):
    assert client.ask(command, payload) == (errno.EINVAL, b"", [])
    assert client.ask("RESET") == (None, b"", [])


@pytest.mark.parametrize("command", ["DEVICE_FEATURE", "DMA_READ", "DMA_WRITE", 14, 17, 4711])
def test_what_is_not_offered(client, command):
    assert client.ask(command, bytes(8))[0] == errno.EOPNOTSUPP


def test_write_multi(server, client):
    body = struct.pack("=QQII8sQII8s", 2, 8, 0, 2, b"ab", 100, 0, 8, b"12345678")
    assert client.ask("WRITE_MULTI", body) == (None, struct.pack("=Q", 2), [])
    assert server.function.log == [(0, 8, b"ab"), (0, 100, b"12345678")]


def test_no_reply_bit(server, client):
    client.send("REGION_WRITE", struct.pack("=QII", 0, 0, 1) + b"z", flags=0x10)
    assert client.ask("REGION_READ", struct.pack("=QII", 0, 0, 1))[1][-1:] == b"z"


def test_reset(server, client):
    assert client.ask("RESET") == (None, b"", [])
    assert server.function.log == ["reset"]


def dma_map(client, iova, size, fd=None, offset=0, flags=3):
    return client.ask("DMA_MAP", struct.pack("=IIQQQ", 32, flags, offset, iova, size), [] if fd is None else [fd])[0]


@pytest.fixture
def memfd():
    fd = os.memfd_create("dma")
    os.ftruncate(fd, 1 << 20)
    os.pwrite(fd, b"hello", 8192)
    yield fd
    os.close(fd)


def test_dma_map_and_unmap(server, client, memfd):
    assert dma_map(client, 0x10000, 8192, memfd, 8192) is None
    assert server.call(lambda: bytes(server.function.dma.view(0x10000, 5))) == b"hello"
    assert dma_map(client, 0x11000, 4096, memfd) == errno.EEXIST
    assert dma_map(client, 0x12000, 4096) is None  # known, not mappable
    body = struct.pack("=IIQQ", 24, 0, 0x10000, 8192)
    assert client.ask("DMA_UNMAP", struct.pack("=IIQQ", 24, 0, 0x10000, 4096))[0] == errno.EINVAL
    assert server.function.log == [], "what was refused took nothing away"
    assert client.ask("DMA_UNMAP", body) == (None, body, [])
    assert ("unmap", 0x10000, 8192) in server.function.log
    assert client.ask("DMA_UNMAP", body) == (None, body, [])  # as Linux: nothing to unmap is no error
    everything = struct.pack("=IIQQ", 24, 2, 0, 0)
    assert client.ask("DMA_UNMAP", everything) == (None, everything, [])
    assert dma_map(client, 0x12000, 4096) is None
    assert client.ask("DMA_UNMAP", struct.pack("=IIQQ", 24, 2, 0, 4096))[0] == errno.EINVAL


def test_dma_map_that_is_not_possible(client, memfd):
    assert dma_map(client, 0, 0, memfd) == errno.EINVAL
    assert dma_map(client, (1 << 64) - 4096, 8192, memfd) == errno.EINVAL
    assert dma_map(client, 0, 1 << 21, memfd) == errno.EINVAL
    assert dma_map(client, 0, 4096, memfd, (1 << 64) - 4096) == errno.EINVAL
    body = struct.pack("=IIQQQ", 32, 3, 0, 0, 4096)
    assert client.ask("DMA_MAP", body, [memfd, memfd])[0] == errno.EINVAL


def set_irqs(client, flags, start, count, data=b"", fds=(), index=2):
    return client.ask("SET_IRQS", struct.pack("=IIIII", 20 + len(data), flags, index, start, count) + data, fds)[0]


NONE, BOOL, EVENTFD, MASK, UNMASK, TRIGGER = 1, 2, 4, 8, 16, 32


def signalled(fd):
    return bool(select.select([fd], [], [], 0)[0]) and bool(os.eventfd_read(fd))


def test_irq_info(client):
    body = client.ask("GET_IRQ_INFO", struct.pack("=IIII", 16, 0, 2, 0))[1]
    assert struct.unpack("=IIII", body) == (16, 3, 2, 5)
    assert struct.unpack("=IIII", client.ask("GET_IRQ_INFO", struct.pack("=IIII", 16, 0, 0, 0))[1]) == (16, 0, 0, 0)


def test_irqs_signal_their_eventfds_and_can_be_triggered(server, client):
    fds = [eventfd() for _ in range(3)]
    assert set_irqs(client, EVENTFD | TRIGGER, 1, 3, fds=fds) is None
    server.call(lambda: server.function.irqs[2].signal(2))
    assert [signalled(fd) for fd in fds] == [False, True, False]
    assert set_irqs(client, NONE | TRIGGER, 1, 1) is None
    assert set_irqs(client, BOOL | TRIGGER, 1, 3, b"\0\0\1") is None
    assert [signalled(fd) for fd in fds] == [True, False, True]
    assert set_irqs(client, EVENTFD | TRIGGER, 1, 1) is None  # no fd: untie
    assert set_irqs(client, NONE | TRIGGER, 1, 1) is None
    assert not signalled(fds[0])
    assert set_irqs(client, NONE | TRIGGER, 0, 0) is None  # all off
    assert set_irqs(client, NONE | TRIGGER, 3, 1) is None
    assert not signalled(fds[2])


def test_masked_irq_is_signalled_at_its_unmasking(server, client):
    fd = eventfd()
    set_irqs(client, EVENTFD | TRIGGER, 0, 1, fds=[fd])
    assert set_irqs(client, NONE | MASK, 0, 1) is None
    server.call(lambda: server.function.irqs[2].signal(0))
    assert server.function.irqs[2].target(0) == -1
    assert not signalled(fd)
    assert set_irqs(client, BOOL | UNMASK, 0, 1, b"\1") is None
    assert signalled(fd)


def test_irqs_that_are_not_possible(client, memfd):
    fd = eventfd()
    assert set_irqs(client, EVENTFD | TRIGGER, 4, 2, fds=[fd, fd]) == errno.EINVAL
    assert set_irqs(client, EVENTFD | TRIGGER, 0, 2, fds=[fd]) == errno.EINVAL
    assert set_irqs(client, EVENTFD | MASK, 0, 1, fds=[fd]) == errno.EINVAL
    assert set_irqs(client, EVENTFD | TRIGGER, 0, 1, fds=[memfd]) == errno.EINVAL
    assert set_irqs(client, BOOL | TRIGGER, 0, 2, b"\1") == errno.EINVAL
    assert set_irqs(client, NONE, 0, 1) == errno.EINVAL
    assert set_irqs(client, 0, 0, 1) == errno.EINVAL
    assert set_irqs(client, NONE | TRIGGER, 0, 1, index=0) == errno.EINVAL
    assert set_irqs(client, NONE | TRIGGER, 0, 0, index=1) is None


def test_second_client_is_told_that_the_function_is_busy(server, client, path):
    second = RawClient(path, None)
    assert second.ask("VERSION", struct.pack("=HH", 0, 1)) == (errno.EBUSY, b"", [])
    second.close()
    third = RawClient(path, None)
    error, body, _ = third.ask("VERSION", struct.pack("=HH", 0, 1) + EXTENDED)
    assert (error, struct.unpack("=I", body)) == (errno.EBUSY, (os.getpid(),))
    third.close()
    assert client.ask("RESET") == (None, b"", [])


def test_client_for_whom_no_file_can_be_opened_has_to_wait(server, path, monkeypatch, caplog):
    monkeypatch.setattr(fd_socket, "_ACCEPT_AGAIN_S", 0.02)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    client = RawClient.__new__(RawClient)
    client.sock = socket.socket(socket.AF_UNIX)
    client.sock.settimeout(10)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        client.sock.connect(str(path))
        wait_until(lambda: "a client has to wait: Too many open files" in caplog.text)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert client.ask("VERSION", struct.pack("=HH", 0, 1))[0] is None
    client.close()


def test_client_that_leaves_takes_its_memory_and_eventfds_along(server, client, path, memfd):
    fd = eventfd()
    set_irqs(client, EVENTFD | TRIGGER, 0, 1, fds=[fd])
    dma_map(client, 0, 4096, memfd)
    client.close()
    again = RawClient(path)  # at once: the clean-up of the first is waited for
    assert server.function.log[-1] == "left"
    assert server.function.irqs[2].target(0) == -1
    assert dma_map(again, 0, 4096, memfd) is None
    again.close()


def test_client_that_takes_no_replies_gets_the_files_of_when_it_asked(server, path):
    client = RawClient(path, EXTENDED)
    request = struct.pack("=IIIIQQ", 4096, 0, 4, 0, 0, 0)
    sent, own = 0, {os.fstat(fd).st_ino for fd in server.function.memory}
    client.sock.settimeout(0.3)
    with contextlib.suppress(TimeoutError):
        while sent < 10000:
            client.send("GET_REGION_INFO", request)
            sent += 1
    assert sent < 10000

    def replace():
        for number, fd in enumerate(server.function.memory):
            os.close(fd)
            server.function.memory[number] = -1
        server.function.region = lambda index: Region(4096)

    server.call(replace)
    other = [os.memfd_create("somebody else's") for _ in range(2)]
    client.sock.settimeout(10)
    for _ in range(sent):
        _, _, fds = client.receive()
        assert {os.fstat(fd).st_ino for fd in fds} <= own
        for fd in fds:
            os.close(fd)
    assert client.ask("RESET")[0] is None
    for fd in other:
        os.close(fd)
    client.close()


def test_reply_that_cannot_be_sent_ends_its_client_only(server, path, monkeypatch, caplog):
    client = RawClient(path)

    async def send(self, data, fds=()):
        raise OSError(errno.ETOOMANYREFS, "too many references")

    with monkeypatch.context() as patched:
        patched.setattr(user_server.FdSocket, "send", send)
        client.send("RESET")
        with pytest.raises(ConnectionError):
            client.receive()
    assert "client dropped" in caplog.text
    client.close()
    again = RawClient(path)
    assert again.ask("RESET")[0] is None
    again.close()


@pytest.mark.parametrize("size", [0, 15, 1 << 30])
def test_bytes_that_are_no_message_end_the_connection(server, client, path, size):
    client.sock.sendall(struct.pack("=HHIII", 1, 9, size, 0, 0))
    with pytest.raises(ConnectionError):
        client.receive()
    again = RawClient(path)
    assert again.ask("RESET")[0] is None
    again.close()


def test_client_that_leaves_in_the_middle_of_a_message(server, client, path):
    client.sock.sendall(struct.pack("=HHIII", 1, 9, 100, 0, 0) + b"half")
    client.close()
    again = RawClient(path)
    assert again.ask("RESET")[0] is None
    again.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(2, 20), st.binary(max_size=64))
def test_any_payload_gets_a_reply(server, client, command, payload):
    before = set(os.listdir("/proc/self/fd"))
    client.ask(command, payload)
    assert set(os.listdir("/proc/self/fd")) <= before


def test_failure_of_the_function_itself_ends_the_server(server, client):
    def fail():
        raise WorkerError("broken")

    server.function.reset = fail
    server.function.client_left = lambda: None
    client.send("RESET")
    with pytest.raises(ConnectionError):
        client.receive()
    wait_until(server._task.done)
    with pytest.raises(WorkerError, match="broken"):
        server._task.result()
    server.close = lambda: server._thread.join(10)
