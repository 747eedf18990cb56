"""The embedded sibling on a back-end that lies, forgets and breaks off: plain Python, one thread."""

import asyncio
import json
import socket
import threading
import time

import pytest

from tests.mock import frontend as wire
from tests.mock.blk_backend import ALL_FEATURES, ALL_PROTOCOL, WITH_INFLIGHT, BlkBackend
from tests.mock.blk_device import IN, IOERR, OK, OUT
from tests.vvupipe.vm.sibling_kit import run, run_json
from vvupipe.errors import ProtocolError, TransportError, UserError, WorkerError
from vvupipe.vm.sibling import SiblingOptions, WorkloadSpec, open_disk, run_workload

pytestmark = pytest.mark.timeout(120)
SIZE = 1 << 20


@pytest.fixture
def path(tmp_path):
    return tmp_path / "s"


def feature_sets():
    both = wire.F_EVENT_IDX | wire.F_INDIRECT
    return {
        "all": ALL_FEATURES,
        "no event idx": ALL_FEATURES & ~wire.F_EVENT_IDX,
        "no indirect": ALL_FEATURES & ~wire.F_INDIRECT,
        "least": (ALL_FEATURES & ~both) & ~wire.F_BLK_FLUSH & ~wire.F_BLK_MQ,
    }


@pytest.mark.parametrize("features", feature_sets().values(), ids=feature_sets())
def test_verify_with_each_set_of_features(path, capsys, features):
    with BlkBackend(path, features=features) as backend:
        status, found = run_json(capsys, path, workload="verify", iodepth=16)
    assert (status, found["workload"]["mismatches"], found["workload"]["verified_blocks"]) == (0, 0, SIZE // 4096)
    assert found["workload"]["flushes"] == int(bool(features & wire.F_BLK_FLUSH))
    assert found["disk"]["serial"] == "mock-disk"
    assert backend.taken_features == features


def when_started(backend, kinds, **hooks):
    """Set hooks of every device, in force from the first request of `kinds` that it sees."""

    def prepare(device):
        device.status = status(device)

    def status(device):
        def look(kind, sector):
            if kind in kinds and len(device.log) > 8:
                for name, value in hooks.items():
                    setattr(device, name, value)
            return OK

        return look

    backend.prepare = prepare


HOSTILE = {
    "an id outside of the queue": ({"used": lambda head, written: [(70000, written)]}, "not in flight"),
    "an id that is free": ({"used": lambda head, written: [(head, written), (200, written)]}, "not in flight|more req"),
    "one id twice": ({"used": lambda head, written: [(head, written), (head, written)]}, "not in flight|more requests"),
    "an index jump": ({"jump": 1000}, "more requests than"),
    "too much written": ({"used": lambda head, written: [(head, written + 5000)]}, "more than the request"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_broken_used_ring_ends_with_one_line(path, name):
    hooks, match = HOSTILE[name]
    backend = BlkBackend(path)
    when_started(backend, {OUT}, **hooks)
    with backend, pytest.raises(ProtocolError, match=match) as raised:
        run(path, workload="randwrite", iodepth=8)
    assert str(raised.value).startswith("the back-end broke vring 0")


def test_errors_are_reported_and_end_with_1(path, capsys):
    backend = BlkBackend(path)
    backend.prepare = lambda device: setattr(
        device, "status", lambda kind, sector: IOERR if kind == IN and sector == 808 else OK
    )
    with backend:
        status, found = run_json(capsys, path, workload="read", bs=512)
    assert (status, found["workload"]["errors"]) == (1, 1)
    assert found["workload"]["first_error"] == "read of sector 808: I/O error"


def test_a_status_that_was_forgotten_is_an_error(path, capsys):
    backend = BlkBackend(path)
    backend.prepare = lambda device: setattr(
        device, "status", lambda kind, sector: None if kind == IN and sector == 808 else OK
    )
    with backend:
        status, found = run_json(capsys, path, workload="read", bs=512)
    assert (status, found["workload"]["first_error"]) == (1, "read of sector 808: status 255")


def test_a_corrupted_block_is_found(path, capsys):
    image = bytearray(SIZE)
    backend = BlkBackend(path, image)

    def after(served):
        log = backend._vrings[0].device.log
        if log and log[-1][0] == 4:  # the flush between writing and reading
            image[5 * 4096 + 100] ^= 255
            backend.after = lambda served: None

    backend.after = after
    with backend:
        status, found = run_json(capsys, path, workload="verify", iodepth=4)
    assert (status, found["workload"]["mismatches"]) == (1, 1)
    assert found["workload"]["first_mismatch_bytes"] == 5 * 4096


def test_a_read_error_ends_a_copy(path, tmp_path):
    backend = BlkBackend(path)
    backend.prepare = lambda device: setattr(
        device, "status", lambda kind, sector: IOERR if kind == IN and sector == 1024 else OK
    )
    target = tmp_path / "folder" / "copy"
    target.parent.mkdir()
    with backend, pytest.raises(Exception, match="failed: read of sector 1024: I/O error"):
        run(path, copy_out=target)
    assert list(target.parent.iterdir()) == []


def test_what_was_measured_before_an_error_is_not_lost(path, tmp_path, capsys):
    backend = BlkBackend(path)
    backend.prepare = lambda device: setattr(
        device, "status", lambda kind, sector: IOERR if kind == IN and sector == 1024 else OK
    )
    with backend, pytest.raises(TransportError, match="I/O error"):
        run(path, json=True, workload="write", copy_out=tmp_path / "copy")
    found = json.loads(capsys.readouterr().out)
    assert found["workload"]["write"]["bytes"] == SIZE
    assert found["error"] == "the copy failed: read of sector 1024: I/O error"
    assert "copy_out" not in found
    with BlkBackend(path.with_name("t")), pytest.raises(UserError):
        run(path.with_name("t"), json=True, workload="write", bs=1000)
    assert capsys.readouterr().out == "", "nothing was done"


def test_leaving_again_and_again_loses_nothing(path, capsys):
    backend = BlkBackend(path)
    backend.after = lambda served: "leave" if served % 7 == 3 and backend.connections < 12 else None
    with backend:
        status, found = run_json(capsys, path, workload="verify", iodepth=16, runtime_s=0.5)
    assert (status, found["workload"]["mismatches"], found["workload"]["errors"]) == (0, 0, 0)
    assert found["reconnects"] == backend.connections - 1 > 3


def test_leaving_during_the_handshake_is_no_end(path, capsys):
    backend = BlkBackend(path)
    handle = backend._handle

    def leave_sometimes(request, body, fds):
        if backend.connections < 12 and len(backend.requests) > 3 * backend.connections + backend.connections**2 // 2:
            raise_reset()
        return handle(request, body, fds)

    def raise_reset():
        raise ConnectionResetError

    backend._handle = leave_sometimes
    session = backend._session

    def session_until_reset(connection):
        try:
            return session(connection)
        except ConnectionResetError:
            backend.requests.clear()
            return None

    backend._session = session_until_reset
    with backend:
        status, found = run_json(capsys, path, workload="verify", size=64 << 10)
    assert (status, found["workload"]["mismatches"]) == (0, 0)
    assert backend.connections >= 2


@pytest.mark.parametrize("request_number", [wire.SET_MEM_TABLE, wire.SET_VRING_ADDR, wire.SET_VRING_ENABLE])
def test_a_refusal_is_one_line(path, request_number):
    backend = BlkBackend(path)
    backend.refused = {request_number}
    with backend, pytest.raises(ProtocolError, match="the back-end refused SET_"):
        run(path)


@pytest.mark.parametrize(
    ("features", "protocol"),
    [(ALL_FEATURES, ALL_PROTOCOL & ~wire.CONFIG), (ALL_FEATURES & ~wire.F_PROTOCOL_FEATURES, 0)],
)
def test_without_configuration_space_there_is_no_disk(path, features, protocol):
    with (
        BlkBackend(path, features=features, protocol=protocol) as backend,
        pytest.raises(ProtocolError, match="cannot tell the size of its disk"),
    ):
        run(path)
    assert wire.GET_CONFIG not in backend.requests


def test_the_err_eventfd_ends_it(path):
    backend = BlkBackend(path)
    backend.after = lambda served: backend.ring_err(0) if served > 20 else None
    with backend, pytest.raises(ProtocolError, match="says that vring 0 is broken"):
        run(path, workload="randread", runtime_s=30.0)


def test_a_disk_of_nothing(path, capsys):
    with BlkBackend(path, bytearray()):
        status, found = run_json(capsys, path)
        assert (status, found["disk"]["size_bytes"]) == (0, 0)
        with pytest.raises(UserError, match="less than one block"):
            run(path, workload="read")


def test_a_disk_larger_than_any_file_is_one_line(path):
    backend = BlkBackend(path)
    config = backend.config()
    backend.config = lambda: (1 << 54).to_bytes(8, "little") + config[8:]
    with backend, pytest.raises(ProtocolError, match=f"the disk has {1 << 54} sectors"):
        run(path)


def test_a_serial_cannot_write_to_the_terminal(path, capsys):
    backend = BlkBackend(path)
    backend.prepare = lambda device: setattr(device, "serial", b"\x1b[2Jdisk\n")
    with backend:
        status, found = run_json(capsys, path)
    assert (status, found["disk"]["serial"]) == (0, "?[2Jdisk")


def test_requests_that_never_come_back_are_given_up(path, monkeypatch):
    """An interrupt while the back-end sits on its requests: the result says how many are missing."""
    monkeypatch.setattr("vvupipe.vm.sibling_workload._INTERRUPT_S", 0.3)
    backend = BlkBackend(path)
    backend.prepare = lambda device: setattr(device, "used", lambda head, written: [])

    async def main():
        async with open_disk(SiblingOptions(path, workload="randread", timeout_s=10.0), lambda line: None) as disk:
            stop = asyncio.Event()
            asyncio.get_running_loop().call_later(0.5, stop.set)
            return await run_workload(disk, WorkloadSpec("randread", iodepth=8), stop=stop)

    with backend:
        began = time.monotonic()
        result = asyncio.run(main())
    assert (result.unfinished, result.ok, result.interrupted) == (8, False, True)
    assert time.monotonic() - began < 30


def test_vcpus_that_cannot_start_do_not_wait_for_a_back_end(path):
    began = time.monotonic()
    with pytest.raises(WorkerError):
        run(path, timeout_s=60.0, spin_max_ns="no number")
    assert time.monotonic() - began < 50


def test_a_back_end_may_be_silent_for_a_while(path, capsys):
    """The wait for an answer is part of the wait for the back-end; here it is busy with another front-end."""
    with BlkBackend(path) as backend:
        other = wire.Frontend(path)
        threading.Timer(1.5, other.close).start()
        status = run(path)
    assert status == 0
    assert backend.connections == 2
    assert f"connected to {path}, waiting for the back-end to answer" in capsys.readouterr().err


def leaving_at(backend, request):
    """`backend` hangs up on each `request`, without an answer."""
    message = backend._message

    def hang_up(connection):
        if len(backend.requests) > 10_000:
            raise AssertionError("it is asked without pause")
        head = connection.recv(12, socket.MSG_PEEK)
        if len(head) == 12 and int.from_bytes(head[:4], "little") == request:
            return False
        return message(connection)

    backend._message = hang_up
    return backend


@pytest.mark.parametrize(
    ("request_number", "protocol"),
    [
        (wire.GET_INFLIGHT_FD, WITH_INFLIGHT),
        (wire.SET_VRING_NUM, ALL_PROTOCOL),
        (wire.SET_VRING_NUM, ALL_PROTOCOL & ~wire.REPLY_ACK),
    ],
)
def test_vrings_that_are_too_large_for_it_are_one_line(path, request_number, protocol):
    """A back-end that hangs up on their size, every time, is not asked for ever, even without a timeout."""
    backend = leaving_at(BlkBackend(path, protocol=protocol), request_number)
    with backend, pytest.raises(UserError, match=r"does not take vrings of 256 entries.* --queue-size 128"):
        run(path, timeout_s=None)
    assert backend.connections == 3


def test_vrings_that_are_refused_are_one_line(path):
    backend = BlkBackend(path)
    backend.refused = {wire.SET_VRING_NUM}
    with backend, pytest.raises(UserError, match=r"does not take vrings of 256 entries.* --queue-size 128"):
        run(path)


@pytest.mark.parametrize("request_number", [wire.GET_CONFIG, wire.SET_MEM_TABLE, wire.SET_VRING_ADDR])
def test_hanging_up_at_the_same_request_for_ever_ends_with_the_timeout(path, request_number):
    backend = leaving_at(BlkBackend(path), request_number)
    began = time.monotonic()
    with backend, pytest.raises(UserError, match=r"hung up during the set-up, again and again for 1\.5 s"):
        run(path, timeout_s=1.5)
    assert time.monotonic() - began < 30
    assert 2 <= backend.connections <= 8, "with pauses that grow"


def test_leaving_when_all_is_set_up_for_ever_ends_with_the_timeout(path):
    backend = BlkBackend(path)
    served = []
    backend.prepare = served.append
    backend.after = lambda count: "leave" if count > 5 else None
    message = backend._message
    backend._message = lambda connection: (
        message(connection) and not (len(served) > 1 and backend.requests[-1] == wire.SET_VRING_ENABLE)
    )
    with backend, pytest.raises(TransportError, match=r"the disk is lost.*hung up"):
        run(path, workload="randread", iodepth=4, timeout_s=1.5)
    assert len(served) <= 9
