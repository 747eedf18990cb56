"""QEMU's own front-end through `vvupipe trace`: the guest does not notice, and the trace tells its whole life."""

import json

import pytest
from backends import Process, vvupipe_command, vvupipe_environment, wait_until
from boot_sector import SECTOR, bootable_image
from guest_kit import boot_guest

from vvupipe.vm.qemu_backend import is_listening

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(180)]


def test_firmware_boots_through_a_trace(backend_factory, tmp_path):
    image = tmp_path / "boot.img"
    image.write_bytes(bootable_image("booted from vhost-user ", 1, 4 << 20))
    path, output = tmp_path / "trace.sock", tmp_path / "trace.json"
    with backend_factory(image, tmp_path) as backend:
        command = vvupipe_command("trace", backend.socket, "--listen", path, "--output", output, "--json")
        trace = Process(command, tmp_path / "trace.log", vvupipe_environment(tmp_path))
        try:
            wait_until(lambda: is_listening(path), [trace])
            disk = {"socket_path": path, "num_queues": backend.queues, "bootindex": 0}
            end = boot_guest(tmp_path, [disk], firmware_only=True)
        finally:
            status = trace.end()
    assert (end.status, status) == (0, 0), (end, trace.log.read_text())
    assert "booted from vhost-user 0" in end.console
    assert image.read_bytes()[SECTOR] == 1
    assert not path.exists()
    entries = [json.loads(line) for line in output.read_text().splitlines()]
    messages = [entry for entry in entries if entry["event"] == "message" and entry["stay"] == entries[-1]["stay"]]
    names = [message["name"] for message in messages]
    assert [name for name in names if name.startswith("GET")][:2] == ["GET_FEATURES", "GET_PROTOCOL_FEATURES"]
    memory = [message for message in messages if message["name"] in ("SET_MEM_TABLE", "ADD_MEM_REG")]
    assert memory
    assert all(message["fds"] for message in memory)
    kicks = [message for message in messages if message["name"] == "SET_VRING_KICK" and message["fds"]]
    assert {tuple(kick["fds"]) for kick in kicks} == {("eventfd",)}
    bases = [message["reply"]["base"] for message in messages if message["name"] == "GET_VRING_BASE"]
    assert max(bases) >= 2  # requests went through the first ring
    assert not [entry for entry in entries if entry["event"] in ("stray", "unanswered") or entry.get("refused")]
