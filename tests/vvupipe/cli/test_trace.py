"""`vvupipe trace` as a process, between a plain front-end and a real back-end, or one that says anything."""

import contextlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest

from tests.conformance.carriers import on_socket
from tests.mock import frontend as fe
from tests.mock.blk_driver import started_disk
from tests.mock.guest_memory import GuestMemory

pytestmark = pytest.mark.timeout(60)

MIB = 1 << 20
ALL_PROTOCOL = (1 << 20) - 1 & ~fe.INBAND


class Trace:
    """A running `vvupipe trace`; `socket` is where front-ends connect."""

    def __init__(self, folder, back_end, *options):
        self.socket = folder / f"{back_end.name}.trace"
        self._output = folder / "trace.out"
        self.errors = folder / "trace.err"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vvupipe", "trace", back_end, "--output", self._output, *options],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors,
            )  # fmt: skip
        wait_until(lambda: f"connect the front-end to {self.socket}" in self.errors.read_text())

    def text(self):
        return self._output.read_text()

    def messages(self):
        """What was written with --json, line by line."""
        return [json.loads(line) for line in self.text().splitlines()]

    def wait_for(self, text):
        wait_until(lambda: text in self.text())

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        assert self.process.wait(10) == 0, self.errors.read_text()
        assert not self.socket.exists()
        assert "Traceback" not in self.errors.read_text()


def wait_until(condition, timeout_s=20):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextlib.contextmanager
def tracing(folder, back_end, *options):
    trace = Trace(folder, back_end, *options)
    try:
        yield trace
        if trace.process.poll() is None:
            trace.stop()
    finally:
        trace.process.kill()
        trace.process.wait(10)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4 * MIB))
    return path


def named(messages, name):
    """Messages that are done; a slow one was begun in a line before."""
    return [message for message in messages if message["event"] == "message" and message["name"] == name]


def test_block_device_works_through_it_and_every_message_is_there(tmp_path, image):
    with on_socket(tmp_path, image) as backend, tracing(tmp_path, backend.socket, "--json") as trace:
        with started_disk(trace.socket) as (frontend, disk):
            disk.write(7, b"x" * 512)
            assert disk.read(7, 512) == b"x" * 512
            frontend.stop_vring(0)
        trace.wait_for('"disconnected"')
        messages = trace.messages()
    assert messages[0]["event"] == "connected"
    assert messages[-1]["event"] == "disconnected"
    (table,) = named(messages, "SET_MEM_TABLE")
    assert [fd.startswith("memfd:") for fd in table["fds"]] == [True] * len(table["fields"]["regions"])
    (kick,) = named(messages, "SET_VRING_KICK")
    assert (kick["fields"], kick["fds"], kick["reply"]) == ({"vring": 0}, ["eventfd"], {"code": 0})
    (base,) = named(messages, "GET_VRING_BASE")
    assert base["reply"] == {"vring": 0, "base": 2}
    assert "F_VERSION_1" in named(messages, "GET_FEATURES")[0]["reply"]["features"]["names"]
    assert image.read_bytes()[7 * 512 : 8 * 512] == b"x" * 512


def test_back_end_channel_and_files_of_replies(tmp_path, image):
    with on_socket(tmp_path, image) as backend, tracing(tmp_path, backend.socket) as trace:
        frontend = fe.Frontend(trace.socket)
        frontend.negotiate(protocol=ALL_PROTOCOL)
        channel = frontend.open_channel()
        os.truncate(image, 8 * MIB)
        backend.process.send_signal(signal.SIGUSR1)
        assert channel.receive()[0] == fe.CHANNEL_CONFIG_CHANGE
        channel.acknowledge(fe.CHANNEL_CONFIG_CHANGE)
        trace.wait_for("back-end  CONFIG_CHANGE_MSG() = 0 <")
        body, fd = frontend.ask_for_fd(fe.GET_INFLIGHT_FD, struct.pack("=QQHH4x", 0, 0, 1, 64))
        assert os.fstat(fd).st_size >= struct.unpack_from("=Q", body)[0] > 0
        os.close(fd)
        with pytest.raises(fe.Refused):
            frontend.tell(fe.SET_VRING_NUM, struct.pack("=II", 0, 77777))
        frontend.close()
        trace.wait_for("+++ front-end 1 left")
        assert channel.sock.recv(1) == b""  # it ends with the connection
        channel.close()
        text = trace.text()
    assert "SET_BACKEND_REQ_FD(fd=<socket>) = 0 <" in text
    assert "SET_VRING_NUM(vring=0, num=77777) = 1 (refused) <" in text
    (line,) = [line for line in text.splitlines() if "GET_INFLIGHT_FD" in line]
    assert line.count("num_queues=1, queue_size=64") == 2
    assert "fd=</" in line


def test_front_ends_come_again_and_the_back_end_comes_later(tmp_path, image):
    path = tmp_path / "blk.sock"
    with tracing(tmp_path, path) as trace:
        early = fe.Frontend(trace.socket)
        early.send(fe.GET_FEATURES)
        wait_until(lambda: "waiting for the back-end" in trace.errors.read_text())
        impatient = fe.Frontend(trace.socket)
        impatient.close()
        for _ in range(2):  # the back-end is another one each time
            with on_socket(tmp_path, image) as backend:
                assert backend.socket == path
                if early:
                    assert early.receive()[0] == fe.GET_FEATURES
                    early.close()
                    early = None
                for _ in range(2):
                    frontend = fe.Frontend(trace.socket)
                    frontend.negotiate()
                    assert len(frontend.get_config(0, 60)) == 60
                    frontend.close()
        assert trace.errors.read_text().count("waiting for the back-end") == 1
        wait_until(lambda: trace.text().count("+++ front-end") == 6)
    text = trace.text()
    assert [f"--- front-end {number} connected" in text for number in range(1, 8)] == [True] * 6 + [False]


def test_front_end_that_leaves_before_the_back_end_comes(tmp_path):
    with tracing(tmp_path, tmp_path / "none.sock") as trace:
        fe.Frontend(trace.socket).close()
        trace.wait_for("+++ front-end 1 left before there was a back-end")
        frontend = fe.Frontend(trace.socket)
        trace.wait_for("front-end 2 connected")
        trace.stop(signal.SIGINT)
        assert frontend.sock.recv(1) == b""
        frontend.close()
    assert "front-end 2 was cut off after 0 messages" in trace.text()


@contextlib.contextmanager
def raw_back_end(path):
    """A listening socket of the test's own: `accepted()` is the back-end's end."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        listening.settimeout(10)
        with contextlib.ExitStack() as stack:

            def accepted():
                sock, _ = listening.accept()
                sock.settimeout(10)
                return stack.enter_context(sock)

            yield accepted


@pytest.mark.parametrize("liar", ["front-end", "back-end"])
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (struct.pack("=III", 1, 1, 100_000), "payload of 100000 bytes"),
        (struct.pack("=III", 1, 2, 0), "vhost-user version 2"),
        (struct.pack("=III", 1, 1, 8) + b"abc", "the peer left after 3 of 8 bytes"),
    ],
)
def test_broken_framing_ends_the_stay_alone(tmp_path, liar, data, reason):
    path = tmp_path / "raw.sock"
    with raw_back_end(path) as accepted, tracing(tmp_path, path) as trace:
        frontend = fe.Frontend(trace.socket)
        back_end = accepted()
        source, other = (frontend.sock, back_end) if liar == "front-end" else (back_end, frontend.sock)
        source.sendall(data)
        if "left" in reason:
            source.shutdown(socket.SHUT_WR)
        assert other.recv(100) == b""
        trace.wait_for(f"+++ front-end 1 was cut off: {reason}")
        frontend.close()
        frontend = fe.Frontend(trace.socket)
        frontend.send(99, b"unknown", flags=0x101)
        assert accepted().recv(100) == struct.pack("=III", 99, 0x101, 7) + b"unknown"
        trace.wait_for(f"request 99(payload={b'unknown'.hex()})")
        frontend.close()


def test_back_end_that_leaves_takes_the_front_end_along(tmp_path):
    path = tmp_path / "raw.sock"
    with raw_back_end(path) as accepted, tracing(tmp_path, path) as trace:
        frontend = fe.Frontend(trace.socket)
        frontend.send(fe.GET_FEATURES)
        back_end = accepted()
        assert len(back_end.recv(12)) == 12
        back_end.close()
        assert frontend.sock.recv(1) == b""
        trace.wait_for("+++ front-end 1 lost its back-end after 1 messages")
        frontend.close()
    assert "GET_FEATURES() = ?" in trace.text()


def test_slow_back_end_slows_the_front_end_down_and_nothing_is_lost(tmp_path):
    path = tmp_path / "raw.sock"
    count, payload = 5000, bytes(range(250)) * 10
    with raw_back_end(path) as accepted, tracing(tmp_path, path, "--json") as trace:
        frontend = fe.Frontend(trace.socket)
        frontend.sock.settimeout(40)
        back_end = accepted()
        sent = []

        def send():
            for number in range(count):
                frontend.send(1000 + number, payload)
                sent.append(number)

        sender = threading.Thread(target=send)
        sender.start()
        # Two socket buffers' worth goes, then the writer waits.
        stands_still = -1
        while stands_still != len(sent):
            stands_still = len(sent)
            time.sleep(0.5)
        assert stands_still < count
        for number in range(count):
            data = back_end.recv(12 + len(payload), socket.MSG_WAITALL)
            assert data == struct.pack("=III", 1000 + number, 1, len(payload)) + payload
        sender.join(10)
        frontend.close()
        trace.wait_for('"disconnected"')
        messages = trace.messages()[1:-1]
    assert [message["request"] for message in messages] == list(range(1000, 1000 + count))


def test_fds_stay_with_their_message(tmp_path):
    path = tmp_path / "raw.sock"
    memory = GuestMemory()
    with raw_back_end(path) as accepted, tracing(tmp_path, path) as trace:
        frontend = fe.Frontend(trace.socket)
        back_end = accepted()
        event = os.eventfd(0)
        frontend.set_memory(memory)  # no REPLY_ACK: all of it goes at once
        frontend.send(fe.SET_OWNER)
        frontend.send(fe.SET_VRING_CALL, struct.pack("=Q", 0), [event])
        for fds_expected in (len(memory.regions), 0, 1):
            data, fds, _, _ = socket.recv_fds(back_end, 12, 8)
            size = struct.unpack("=III", data)[2]
            assert len(back_end.recv(size) if size else b"") == size
            assert len(fds) == fds_expected
            if data[:4] == struct.pack("=I", fe.SET_VRING_CALL):
                os.eventfd_write(fds[0], 3)
            for fd in fds:
                os.close(fd)
        assert select.select([event], [], [], 5)[0]
        assert os.eventfd_read(event) == 3
        os.close(event)
        frontend.close()


def test_back_end_channel_passes_on_fds_both_ways_and_ends_with_either_side(tmp_path):
    path = tmp_path / "raw.sock"
    with raw_back_end(path) as accepted, tracing(tmp_path, path) as trace:
        frontend = fe.Frontend(trace.socket)
        back_end = accepted()
        for closer in (0, 1):
            ours, given = socket.socketpair()
            frontend.send(fe.SET_BACKEND_REQ_FD, fds=[given.fileno()])
            given.close()
            data, (fd,), _, _ = socket.recv_fds(back_end, 12, 8)
            assert struct.unpack("=III", data) == (fe.SET_BACKEND_REQ_FD, 1, 0)
            ends = [ours, socket.socket(fileno=fd)]
            event = os.eventfd(0)
            request = struct.pack("=III", 8, 1 | fe.NEED_REPLY, 16) + bytes(16)  # SHARED_OBJECT_LOOKUP
            ends[1].sendmsg([request])
            assert ends[0].recv(100) == request
            reply = struct.pack("=IIIQ", 8, 1 | fe.REPLY, 8, 0)
            socket.send_fds(ends[0], [reply], [event])
            answer = ends[1].recvmsg(len(reply), socket.CMSG_SPACE(4), socket.MSG_WAITALL)
            assert answer[0] == reply
            os.eventfd_write(struct.unpack("=i", answer[1][0][2])[0], 1)
            assert os.eventfd_read(event) == 1
            os.close(struct.unpack("=i", answer[1][0][2])[0])
            os.close(event)
            ends[closer].close()
            assert ends[1 - closer].recv(1) == b""
            ends[1 - closer].close()
        # What is no socket is the back-end's business.
        event = os.eventfd(5)
        frontend.send(fe.SET_BACKEND_REQ_FD, fds=[event])
        _, (fd,), _, _ = socket.recv_fds(back_end, 12, 8)
        assert os.eventfd_read(fd) == 5
        os.close(fd)
        os.close(event)
        frontend.close()
        trace.wait_for("+++ front-end 1 left after 7 messages")
    assert (
        trace.text().count("SHARED_OBJECT_LOOKUP(uuid=00000000-0000-0000-0000-000000000000) = code=0, fd=<eventfd>")
        == 2
    )


@pytest.mark.parametrize("gone", ["full disk", "reader that left"])
def test_messages_pass_when_the_trace_cannot_be_written(tmp_path, gone):
    path, listen = tmp_path / "raw.sock", tmp_path / "listen.sock"
    command = [sys.executable, "-m", "vvupipe", "trace", path, "--listen", listen]
    reading, writing = os.pipe()
    os.close(reading)
    with raw_back_end(path) as accepted:
        process = subprocess.Popen(
            command + (["--output", "/dev/full"] if gone == "full disk" else []),
            stdin=subprocess.DEVNULL, stdout=writing, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        os.close(writing)
        try:
            frontend = fe.Frontend(listen)
            back_end = accepted()
            for request in (fe.SET_OWNER, fe.GET_FEATURES):
                frontend.send(request)
                assert back_end.recv(100) == struct.pack("=III", request, 1, 0)
            frontend.close()
            process.terminate()
            errors = process.communicate(timeout=10)[1]
        finally:
            process.kill()
            process.wait(10)
    assert process.returncode == 0
    assert errors.count("the trace ends here, the messages still pass") == 1
    assert len(errors.splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{}/s", "--listen", "{}/s"], "is the back-end's own socket"),
        (["{}/s", "--listen", "{}/no/s"], "cannot listen at"),
        (["{}/s", "--output", "{}/no/s"], "the trace cannot be written to"),
        ([""], "is no socket"),
        (["/"], "is no socket"),
    ],
)
def test_user_errors(tmp_path, arguments, words):
    done = subprocess.run(
        [sys.executable, "-m", "vvupipe", "trace", *(argument.format(tmp_path) for argument in arguments)],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_trace_of_a_sibling_is_refused(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "vvupipe", "run", "--vhost-user-blk", "s", "--trace", tmp_path / "t"],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (2, "vvupipe: --trace goes with --vvu-proxy\n")
