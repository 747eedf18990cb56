import errno
import os
import socket
import struct
import threading

import pytest

from vvupipe.errors import TransportError, UserError
from vvupipe.vfio import user_client
from vvupipe.vfio.user_client import VfioUserFunction


@pytest.fixture
def function(server, path):
    function = VfioUserFunction.connect(path, "0000:00:10.0 of vm0")
    yield function
    function.close()


def test_regions(function):
    function.check()
    assert (function.region_size(0), function.region_size(4), function.region_size(1)) == (4096, 1 << 20, 0)
    function.write(0, 8, b"12345678")
    assert function.read(0, 10, 4) == b"3456"


def test_large_access_is_cut_into_what_was_agreed(function, server):
    function._server_transfer = 1000
    data = os.urandom(4096)
    function.write(0, 0, data)
    assert len(server.function.log) == 5
    assert function.read(0, 0, 4096) == data


def test_mappable_areas_have_their_own_fds(function):
    areas = function.mappable_areas(4)
    assert [(a.offset, a.size_bytes, a.fd_offset) for a in areas] == [(0, 8192, 0), (8192, 4096, 4096)]
    assert [os.pread(a.fd, 6, a.fd_offset) for a in areas] == [b"area 0", b"area 1"]
    for area in areas:
        area.close()
    assert function.mappable_areas(0) == []


def test_small_first_guess_asks_again(function, monkeypatch):
    monkeypatch.setattr(user_client, "_ROOM_BYTES", 32)
    areas = function.mappable_areas(4)
    assert len(areas) == 2
    for area in areas:
        area.close()


def test_io_event(function, server):
    fd = function.io_event(2, 12, bytes(4))
    os.eventfd_write(fd, 1)
    assert os.eventfd_read(server.function.bell) == 1
    os.close(fd)
    os.close(function.io_event(2, 8, bytes(1)))  # an event of size 0 stands for writes of any size
    assert function.io_event(2, 12, bytes(8)) is None
    assert function.io_event(2, 16, bytes(4)) is None
    assert function.io_event(0, 12, bytes(4)) is None


def test_irqs_dma_and_reset(function, server):
    assert (function.irq_count(2), function.irq_count(0)) == (5, 0)
    fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(5)]
    function._server_fds = 2  # three messages
    function.set_irq_eventfds(2, 0, fds)
    server.call(lambda: [server.function.irqs[2].signal(k) for k in (0, 4)])
    assert (os.eventfd_read(fds[0]), os.eventfd_read(fds[4])) == (1, 1)
    function.disable_irqs(2)
    assert server.function.irqs[2].target(4) == -1
    memory = os.memfd_create("dma")
    os.ftruncate(memory, 8192)
    function.dma_map(0x1000, 4096, memory, 4096)
    with pytest.raises(TransportError, match="refused DMA_MAP: File exists"):
        function.dma_map(0x1000, 4096, memory, 0)
    function.dma_unmap(0x1000, 4096)
    function.reset()
    assert server.function.log[-1] == "reset"
    for fd in [*fds, memory]:
        os.close(fd)


def test_function_in_use_names_the_process(function, path):
    with pytest.raises(UserError, match=f"0000:00:10.0 of vm9 is in use by process {os.getpid()}: stop that first"):
        VfioUserFunction.connect(path, "0000:00:10.0 of vm9")


def test_nobody_serves(tmp_path):
    with pytest.raises(UserError, match="does not answer"):
        VfioUserFunction.connect(tmp_path / "none.sock", "f")


def test_server_that_goes(function, server):
    server.call(server._task.cancel)
    server._thread.join(10)
    with pytest.raises(TransportError, match="is gone"):
        function.read(0, 0, 4)
    function.close()
    with pytest.raises(TransportError, match="was let go"):
        function.read(0, 0, 4)
    server.close = lambda: None


def scripted(monkeypatch, *replies):
    """A client whose server answers with these bytes, one after the other."""
    monkeypatch.setattr(user_client, "_ANSWER_S", 0.3)
    ours, theirs = socket.socketpair()

    def serve():
        with theirs:
            for reply in replies:
                theirs.recv(65536)
                theirs.sendall(reply)
            theirs.recv(65536)
            if replies:
                theirs.settimeout(2)
                theirs.recv(1)

    threading.Thread(target=serve, daemon=True).start()
    return VfioUserFunction(ours, "f")


def reply(message_id, command, payload=b"", flags=1, error=0, size=None):
    return (
        struct.pack("=HHIII", message_id, command, 16 + len(payload) if size is None else size, flags, error) + payload
    )


def test_silent_server(monkeypatch):
    ours, theirs = socket.socketpair()
    monkeypatch.setattr(user_client, "_ANSWER_S", 0.2)
    function = VfioUserFunction(ours, "f")
    with pytest.raises(TransportError, match="has not answered"):
        function.reset()
    theirs.close()
    function.close()


def test_busy_function_of_another_server(monkeypatch):
    function = scripted(monkeypatch, reply(1, 1, b"in use", flags=0x21, error=errno.EBUSY))
    with pytest.raises(UserError, match="in use by another process"):
        function.negotiate()
    function.close()


def test_server_that_takes_no_data(monkeypatch):
    version = struct.pack("=HH", 0, 1) + b'{"capabilities":{"max_data_xfer_size":0}}\0'
    function = scripted(monkeypatch, reply(1, 1, version))
    with pytest.raises(TransportError, match="no data"):
        function.negotiate()
    function.close()


@pytest.mark.parametrize("ask", [lambda f: f.mappable_areas(4), lambda f: f.io_event(2, 12, bytes(4))])
def test_without_room_for_more_files_none_is_lost(function, monkeypatch, ask):
    before = set(os.listdir("/proc/self/fd"))
    real, left = os.dup, [0, 1]  # the second one fails

    def dup(fd):
        if threading.current_thread() is threading.main_thread() and not left.pop():
            raise OSError(errno.EMFILE, "Too many open files")
        return real(fd)

    monkeypatch.setattr(os, "dup", dup)
    with pytest.raises(OSError, match="Too many"):
        ask(function)
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("when", ["before the command", "with the command unread", "with the command read"])
def test_whenever_the_vm_is_killed_the_reason_is_the_same(when):
    ours, theirs = socket.socketpair()
    function = VfioUserFunction(ours, "f")

    def die():
        if when != "before the command":
            theirs.recv(65536, socket.MSG_PEEK if when == "with the command unread" else 0)
        theirs.close()

    dying = threading.Thread(target=die)
    if when == "before the command":
        die()
    else:
        dying.start()
    with pytest.raises(TransportError, match="function f is gone: its VM ended"):
        function.reset()
    if dying.ident:
        dying.join()
    function.close()


@pytest.mark.parametrize(
    "answer",
    [reply(2, 13), reply(1, 9), reply(1, 13, flags=0), reply(1, 13, size=3), reply(1, 13, size=1 << 31)],
)
def test_answer_that_is_none(monkeypatch, answer):
    function = scripted(monkeypatch, answer)
    with pytest.raises(TransportError, match="is gone"):
        function.reset()
    function.close()


def test_answer_that_is_too_short(monkeypatch):
    function = scripted(monkeypatch, reply(1, 9, bytes(16)))
    with pytest.raises(TransportError, match="answered REGION_READ with 16 bytes"):
        function.read(0, 0, 4)
    function.close()


@pytest.mark.parametrize("entry", [(0, 0, 9, 0), (0, 1, 0, 0)])
def test_areas_that_contradict_themselves(monkeypatch, entry):
    start, extra, index, _ = entry
    caps = struct.pack("=HHIIIQQ", 1, 1, 64, 1 + extra, 0, start, 4096) + struct.pack(
        "=HHIIIIIQ", 0x7676, 1, 0, 1, 0, index, 0, 0
    )
    body = struct.pack("=IIIIQQ", 32 + len(caps), 15, 4, 32, 1 << 20, 0) + caps
    function = scripted(monkeypatch, reply(1, 5, body))
    with pytest.raises(TransportError):
        function.mappable_areas(4)
    function.close()
