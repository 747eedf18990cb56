"""The real block back-end on the function, and what happens when one of the two is killed."""

import contextlib
import os
import random
import time

import pytest

from tests.conformance.carriers import start, stop
from tests.mock.blk_driver import started_disk
from tests.vvupipe.vvu.device_vm import ADDRESS, Vm
from vvupipe.vm.guest_ram import SLOT_BYTES, RamSlot
from vvupipe.vm.runtime_folder import find_vm


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(2).randbytes(1 << 20))
    return path


@contextlib.contextmanager
def back_end(folder, image, name="back-end"):
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(folder)}
    command = ["device", "block", "--file", image, "--vfio", "00:10.0", "--vm", "dev", "--json"]
    process, ready = start(command, folder / f"{name}.log", environment)
    assert ready["transport"] == f"VVU function {ADDRESS} of dev"
    try:
        yield process
    finally:
        stop(process)
        assert "Traceback" not in (folder / f"{name}.log").read_text()


def test_killed_back_end_is_followed_by_another(vm, tmp_path, image):
    content = image.read_bytes()
    with back_end(tmp_path, image, "first") as process, started_disk(vm.socket) as (frontend, disk):
        assert disk.read(8, 4096) == content[4096:8192]
        process.kill()
        with pytest.raises(ConnectionError):
            frontend.receive()
        process.wait(10)
    with back_end(tmp_path, image, "second"), started_disk(vm.socket) as (_, disk):
        assert disk.read(8, 4096) == content[4096:8192]
        disk.write(0, b"written after" + bytes(499))
        disk.flush()
    assert image.read_bytes()[:13] == b"written after"
    slot = RamSlot.take(find_vm("dev").ram_name)
    assert slot.gpa == SLOT_BYTES  # neither back-end kept its slot
    slot.close()


def test_back_end_of_a_killed_vm_says_so_in_one_line(tmp_path, monkeypatch, image):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    vm = Vm(tmp_path)
    with back_end(tmp_path, image) as process:
        with started_disk(vm.socket) as (_, disk):
            disk.read(0, 512)
            vm.kill()
            assert process.wait(15) == 1
        lines = (tmp_path / "back-end.log").read_text().splitlines()
        if lines[0] == "loading the kernels":  # said on a machine that is busy
            del lines[0]
        assert lines == [f"vvupipe: function {ADDRESS} of dev is gone: its VM ended"]
    again = Vm(tmp_path)
    with back_end(tmp_path, image, "again"), started_disk(again.socket) as (_, disk):
        disk.read(0, 512)
    again.stop()


def test_siblings_come_and_go_under_load(vm, tmp_path, image):
    content = image.read_bytes()
    with back_end(tmp_path, image):
        began = time.monotonic()
        for _ in range(10):
            with started_disk(vm.socket) as (_, disk):
                for sector in range(0, 64, 8):
                    assert disk.read(sector, 4096) == content[sector * 512 : sector * 512 + 4096]
        assert time.monotonic() - began < 50
