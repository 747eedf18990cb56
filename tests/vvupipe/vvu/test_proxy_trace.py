"""`vvupipe run --vvu-proxy --trace`: the sibling's messages as the proxy's socket sees them."""

import contextlib
import json
import os
import signal
import struct
import time

import pytest

from tests.conformance.carriers import start, stop
from tests.mock import frontend as fe
from tests.mock.guest_memory import GuestMemory
from tests.vvupipe.vvu.device_vm import ADDRESS, running

pytestmark = pytest.mark.timeout(90)

MIB = 1 << 20


def objects_of(path, last, timeout_s=10):
    """The objects of a trace once `last` is in one of them."""
    deadline = time.monotonic() + timeout_s
    while last not in path.read_text():
        assert time.monotonic() < deadline, path.read_text()
        time.sleep(0.02)
    return [json.loads(line) for line in path.read_text().splitlines()]


@contextlib.contextmanager
def block_device(folder, vm, image):
    """The back-end in the VM; the VM gives its run-time folder to it."""
    arguments = ["device", "block", "--vfio", ADDRESS, "--vm", vm.name, "--file", image, "--json"]
    process, _ = start(arguments, folder / "block.log", dict(os.environ))
    try:
        yield process
    finally:
        stop(process)


def talk(vm, back_end, image):
    """A stay with questions, memory, a refusal by the proxy itself, and a request of the back-end."""
    frontend = fe.Frontend(vm.socket)
    _, offered = frontend.negotiate(protocol=fe.MQ | fe.REPLY_ACK | fe.CONFIG | fe.BACKEND_REQ | fe.INFLIGHT_SHMFD)
    memory = GuestMemory()
    frontend.set_memory(memory)
    table = struct.pack("=II4Q", 1, 0, 0, 4096, 0, 0)
    with pytest.raises(fe.Refused):  # a memory table without its files
        frontend.tell(fe.SET_MEM_TABLE, table)
    channel = frontend.open_channel()
    os.truncate(image, 8 * MIB)
    back_end.send_signal(signal.SIGUSR1)
    assert channel.receive()[0] == fe.CHANNEL_CONFIG_CHANGE
    channel.acknowledge(fe.CHANNEL_CONFIG_CHANGE)
    _, fd = frontend.ask_for_fd(fe.GET_INFLIGHT_FD, struct.pack("=QQHH4x", 0, 0, 1, 64))
    os.close(fd)
    channel.close()
    frontend.close()
    memory.close()
    return offered


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_messages_of_a_sibling(tmp_path, monkeypatch, several):
    path = tmp_path / "trace.json"
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(4 * MIB))
    other = ["--vvu-proxy", f"{tmp_path}/other.sock,addr=00:11.0"] if several else []
    with (
        running(tmp_path, monkeypatch, options=[*other, "--trace", path]) as vm,
        block_device(tmp_path, vm, image) as back_end,
    ):
        offered = talk(vm, back_end, image)
        objects = objects_of(path, '"disconnected"')
    assert {entry.get("proxy") for entry in objects} == {ADDRESS if several else None}
    assert [entry["event"] for entry in objects if "name" not in entry] == ["connected", "disconnected"]
    messages = {entry["name"]: entry for entry in objects if "name" in entry}
    # What the sibling was told, not what the driver said.
    assert messages["GET_PROTOCOL_FEATURES"]["reply"]["features"]["value"] == offered
    tables = [entry for entry in objects if (entry["event"], entry.get("name")) == ("message", "SET_MEM_TABLE")]
    assert [bool(entry["fds"]) for entry in tables] == [True, False]
    assert [entry["refused"] for entry in tables] == [False, True]
    assert messages["SET_BACKEND_REQ_FD"]["fds"] == ["socket"]
    change = messages["CONFIG_CHANGE_MSG"]
    assert (change["event"], change["from"], change["reply"]) == ("message", "back-end", {"code": 0})
    assert len(messages["GET_INFLIGHT_FD"]["reply_fds"]) == 1
