"""The device VM as a process: what it prints, what it refuses, what it leaves behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.vvupipe.vvu.device_vm import ADDRESS, Vm, running
from vvupipe.errors import UserError
from vvupipe.pci.address import PciAddress
from vvupipe.vm import lspci
from vvupipe.vm.device_vm import lspci_lines
from vvupipe.vm.pci_bus import PciBus
from vvupipe.vm.vvu_transport import find_function, open_vvu_transport

LINE = "00:10.0 Unclassified device [00ff]: Red Hat, Inc. Device 107d (rev 01)"


@pytest.fixture
def vm(tmp_path, monkeypatch):
    with running(tmp_path, monkeypatch) as vm:
        yield vm


def vvupipe(folder, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", "vvupipe", *map(str, arguments)],
        capture_output=True, text=True, timeout=60, check=False, env={**os.environ, "XDG_RUNTIME_DIR": str(folder)},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


NAME = f"test{os.getpid()}"  # other people's VMs have their memory in /dev/shm too


def shm_names():
    return {name for name in os.listdir("/dev/shm") if f"-{NAME}" in name}


def test_ready_line(vm, tmp_path):
    assert vm.ready["event"] == "ready"
    assert (vm.ready["name"], vm.ready["pid"]) == ("dev", vm.process.pid)
    assert vm.ready["functions"] == [{"address": ADDRESS, "lspci": LINE, "socket": str(vm.socket), "uuid": None}]
    description = json.loads((tmp_path / "vvupipe" / "dev" / "vm.json").read_text())
    assert description["pid"] == vm.process.pid
    assert os.path.getsize(f"/dev/shm{description['ram']}") == 16 << 20


def test_lspci_line(vm, tmp_path, monkeypatch):
    assert lspci_lines("dev") == lspci_lines(None) == [LINE]
    assert vvupipe(tmp_path, "lspci")[:2] == (0, LINE + "\n")
    if shutil.which("lspci"):
        stock = ["lspci", "-O", f"sysfs.path={tmp_path}/vvupipe/dev/sys/bus/pci", "-s", "00:10.0"]
        assert subprocess.check_output(stock, text=True) == LINE + "\n"
    monkeypatch.setattr(lspci.shutil, "which", lambda name: None)
    assert lspci_lines("dev") == [LINE]


def test_lspci_shows_what_the_driver_switched_on(vm, tmp_path):
    config = tmp_path / "vvupipe" / "dev" / "sys" / "bus" / "pci" / "devices" / ADDRESS / "config"
    assert config.read_bytes()[4] == 0
    transport = open_vvu_transport("00:10.0", None)
    assert config.read_bytes()[4] == 6
    transport.close()
    deadline = time.monotonic() + 5
    while config.read_bytes()[4]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_it_and_nothing_is_left(tmp_path, monkeypatch, number):
    vm = Vm(tmp_path, name=NAME)
    assert len(shm_names()) == 1
    vm.process.send_signal(number)
    assert vm.process.wait(10) == 0
    vm.stop()
    assert not shm_names()
    assert not vm.socket.exists()
    assert os.listdir(tmp_path / "vvupipe") == [".lock"]
    assert "Traceback" not in vm.log()


def test_start_after_a_kill_cleans_up(tmp_path, monkeypatch):
    vm = Vm(tmp_path, name=NAME)
    vm.kill()
    assert vm.socket.exists()
    assert len(shm_names()) == 1
    other = Vm(tmp_path, name="other")
    assert not shm_names()
    assert not vm.socket.exists()
    again = Vm(tmp_path, name=NAME)  # same name, same socket
    other.stop()
    again.stop()
    assert not shm_names()


def test_several_vms_at_once(tmp_path, monkeypatch):
    with running(tmp_path, monkeypatch, name="a") as first, running(tmp_path, monkeypatch, name="b"):
        with pytest.raises(UserError, match=rf"several device VMs have a function at {ADDRESS} \(a, b\): .* --vm NAME"):
            find_function(PciAddress.parse(ADDRESS), None)
        assert find_function(PciAddress.parse(ADDRESS), "b").vm.name == "b"
        with pytest.raises(UserError, match=r"no VVU function at 0000:00:11\.0: a has 0000:00:10\.0; b has"):
            find_function(PciAddress.parse("00:11.0"), None)
        with pytest.raises(UserError, match="no device VM named c runs"):
            find_function(PciAddress.parse(ADDRESS), "c")
        for transport in (open_vvu_transport(ADDRESS, "a"), open_vvu_transport(ADDRESS, "b")):
            transport.close()
        assert first.process.poll() is None


def test_two_functions_take_their_places(tmp_path, monkeypatch):
    other = tmp_path / "second.sock"
    uuid = "00112233-4455-6677-8899-aabbccddeeff"
    options = ("--vvu-proxy", f"{other},uuid={uuid}", "--vvu-proxy", f"{tmp_path}/third.sock,addr=00:01.0")
    with running(tmp_path, monkeypatch, options=options) as vm:
        assert [f["address"] for f in vm.ready["functions"]] == [ADDRESS, "0000:00:02.0", "0000:00:01.0"]
        assert len(lspci_lines(None)) == 3
        transport = open_vvu_transport("00:02.0", None)
        assert transport.driver.function.read(0, 0x2008, 16) == bytes.fromhex(uuid.replace("-", ""))
        transport.close()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--vvu-proxy", "{}/s,addr=00:99.0"], "'00:99.0' is not a PCI address"),
        (["--vvu-proxy", "{}/s,addr=0001:00:10.0"], "bus 00 of domain 0000 only"),
        (["--vvu-proxy", "{}/s,addr=00:10.0", "--vvu-proxy", "{}/t,addr=0000:00:10.0"], "0000:00:10.0 is taken"),
        (["--vvu-proxy", "{}/s,uuid=12"], "uuid=12 is not a UUID"),
        (["--vvu-proxy", "{}/s", "--vvu-proxy", "{}/s"], "is in use by another process"),
        (["--vvu-proxy", "{}/no/s"], "cannot listen at"),
        (["--vvu-proxy", "{}/s", "--name", "a/b"], "cannot be a VM's name"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(tmp_path, arguments, line):
    named = [] if "--name" in arguments else ["--name", NAME]
    status, output, errors = vvupipe(tmp_path, "run", *named, *(text.format(tmp_path) for text in arguments))
    assert (status, output) == (2, "")
    assert line in errors
    assert errors.count("\n") == 1
    assert not shm_names()
    assert set(os.listdir(tmp_path)) <= {"vvupipe"}


def test_socket_and_name_of_a_running_vm(vm, tmp_path):
    status, _, errors = vvupipe(tmp_path, "run", "--vvu-proxy", vm.socket)
    assert (status, errors.count("\n")) == (2, 1)
    assert "is in use" in errors
    status, _, errors = vvupipe(tmp_path, "run", "--vvu-proxy", f"{tmp_path}/n.sock", "--name", "dev")
    assert status == 2
    assert "a VM named dev runs already" in errors
    assert os.listdir(tmp_path / "vvupipe" / "dev")


def test_bus_that_is_full():
    bus = PciBus()
    for _ in range(31):
        bus.take(None)
    with pytest.raises(UserError, match="the PCI bus is full"):
        bus.take(None)


def test_long_runtime_folder(tmp_path, monkeypatch):
    folder = tmp_path / ("d" * 90)
    folder.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    process = subprocess.Popen(
        [sys.executable, "-m", "vvupipe", "run", "--vvu-proxy", f"{tmp_path}/s.sock,addr=00:10.0", "--json"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert json.loads(process.stdout.readline())["event"] == "ready"
        open_vvu_transport("00:10.0", None).close()
    finally:
        process.terminate()
        process.wait(10)
        process.stdout.close()
