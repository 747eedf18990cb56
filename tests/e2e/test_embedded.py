"""The main job on the embedded default: device VM, back-end by VFIO, sibling; and who survives whom."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import time

import psutil
import pytest
from embedded import ADDRESS

pytestmark = pytest.mark.timeout(180)


def ended(process, timeout=90):
    """The JSON of a sibling that ends by itself, and its exit status."""
    printed, _ = process.communicate(timeout=timeout)
    return json.loads(printed.splitlines()[-1]), process.returncode, printed


def verified(process):
    result, status, printed = ended(process)
    work = result["workload"]
    assert (status, work["mismatches"], work["errors"], work["unfinished"]) == (0, 0, 0, 0), printed
    assert work["verified_blocks"] > 0
    return result


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_main_job(scene, image, tmp_path):
    vm = scene.device_vm()
    backend = scene.backend(image)
    listed = scene.run("lspci", "-s", ADDRESS)
    expected = "00:10.0 Unclassified device [00ff]: Red Hat, Inc. Device 107d (rev 01)\n"
    assert (listed.returncode, listed.stdout) == (0, expected)
    sibling = scene.sibling("--sha256")
    found, status, _ = ended(sibling)
    assert status == 0
    assert found["disk"]["size_bytes"] == 16 << 20
    assert found["sha256"] == sha256(image)

    new = tmp_path / "new.img"
    new.write_bytes(os.urandom(16 << 20))
    assert ended(scene.sibling("--copy-in", new))[1] == 0
    assert image.read_bytes() == new.read_bytes(), "what the sibling wrote and flushed is in the image"
    assert ended(scene.sibling("--copy-out", tmp_path / "out.img"))[1] == 0
    assert (tmp_path / "out.img").read_bytes() == new.read_bytes()
    verified(scene.sibling("--workload", "verify", "--numjobs", "2", "--size", "4m"))

    assert scene.end(backend)[0] == 0
    assert scene.end(vm)[0] == 0
    assert not scene.left_behind()


def test_stock_lspci_reads_our_bus(scene):
    if not shutil.which("lspci"):
        pytest.skip("lspci is not installed (package pciutils)")
    vm = scene.device_vm()
    bus = scene.folder / "vvupipe" / scene.name / "sys" / "bus" / "pci"
    said = subprocess.run(
        ["lspci", "-O", f"sysfs.path={bus}", "-s", "00:10.0"], capture_output=True, text=True, check=True
    )
    assert said.stdout == "00:10.0 Unclassified device [00ff]: Red Hat, Inc. Device 107d (rev 01)\n"
    scene.end(vm)


def test_any_order_of_starting(scene, image):
    sibling = scene.sibling("--sha256")
    time.sleep(0.5)
    vm = scene.device_vm()
    time.sleep(0.5)
    backend = scene.backend(image)
    found, status, _ = ended(sibling)
    assert (status, found["sha256"]) == (0, sha256(image))
    scene.end(backend)
    scene.end(vm)
    assert not scene.left_behind()


def verifying(scene):
    """A sibling in the middle of a verify workload."""
    sibling = scene.sibling("--workload", "verify", "--runtime", "6s", "--size", "8m")
    time.sleep(2.5)
    assert sibling.poll() is None
    return sibling


def test_workers_killed_while_verifying(scene, image):
    vm, backend = scene.device_vm(), scene.backend(image)
    sibling = verifying(scene)
    for _ in range(3):
        for worker in psutil.Process(backend.pid).children():
            worker.kill()
        time.sleep(0.7)
    assert verified(sibling)["reconnects"] == 0, "the sibling sees nothing of it"
    scene.end(backend)
    scene.end(vm)
    assert not scene.left_behind()


def test_back_end_killed_while_verifying(scene, image):
    vm, backend = scene.device_vm(), scene.backend(image)
    sibling = verifying(scene)
    scene.kill(backend)
    time.sleep(0.5)
    backend = scene.backend(image)
    assert verified(sibling)["reconnects"] == 1
    scene.end(backend)
    scene.end(vm)
    assert not scene.left_behind()


def test_back_end_ended_while_verifying(scene, image):
    vm, backend = scene.device_vm(), scene.backend(image)
    sibling = verifying(scene)
    assert scene.end(backend)[0] == 0
    backend = scene.backend(image)
    assert verified(sibling)["reconnects"] == 1
    scene.end(backend)
    scene.end(vm)


def test_sibling_killed_while_verifying(scene, image):
    vm, backend = scene.device_vm(), scene.backend(image)
    sibling = verifying(scene)
    vcpus = psutil.Process(sibling.pid).children()
    scene.kill(sibling)
    psutil.wait_procs(vcpus, 10)
    assert not [vcpu for vcpu in vcpus if vcpu.is_running() and vcpu.status() != psutil.STATUS_ZOMBIE]
    verified(verifying(scene))
    scene.end(backend)
    scene.end(vm)
    assert not scene.left_behind()


def test_device_vm_killed_while_verifying(scene, image):
    vm, backend = scene.device_vm(), scene.backend(image)
    sibling = verifying(scene)
    scene.kill(vm)
    printed, _ = backend.communicate(timeout=20)
    assert backend.returncode == 1
    assert "is gone: its VM ended" in printed
    assert "Traceback" not in printed
    vm = scene.device_vm()
    backend = scene.backend(image)
    assert verified(sibling)["reconnects"] == 1
    scene.end(backend)
    scene.end(vm)
    assert not [thing for thing in scene.left_behind() if "vvupipe-" not in str(thing)]


def test_ctrl_c_leaves_nothing(scene, image):
    vm, backend = scene.device_vm(), scene.backend(image)
    sibling = verifying(scene)
    scene.end(sibling, signal.SIGINT)
    assert scene.end(backend, signal.SIGINT)[0] == 0
    assert scene.end(vm, signal.SIGINT)[0] == 0
    assert not scene.left_behind()


def test_second_back_end_is_told_that_the_function_is_in_use(scene, image):
    vm, backend = scene.device_vm(), scene.backend(image)
    second = scene.run("device", "block", "--vfio", ADDRESS, "--file", image)
    assert second.returncode == 2
    assert "in use" in second.stderr
    assert len(second.stderr.splitlines()) == 1
    verified(scene.sibling("--workload", "verify", "--size", "1m"))
    scene.end(backend)
    scene.end(vm)


def test_vrings_larger_than_the_back_end_takes_are_one_line(scene, image):
    vm = scene.device_vm()
    backend = scene.start("device", "block", "--vfio", ADDRESS, "--file", image, "--json", "--queue-size", 128)
    refused = scene.run("run", "--vhost-user-blk", scene.socket)
    assert (refused.returncode, refused.stdout) == (2, "")
    (line,) = refused.stderr.splitlines()
    assert "does not take vrings of 256 entries" in line
    assert "--queue-size 128" in line
    assert scene.run("run", "--vhost-user-blk", scene.socket, "--queue-size", 128, "--timeout", "30s").returncode == 0
    status, printed = scene.end(backend)
    assert status == 0
    assert "of up to 128 (--queue-size) are possible" in printed
    scene.end(vm)


def test_disk_full_is_an_error_for_the_sibling_and_nothing_is_lost(scene, tmp_path):
    """A sparse image on a file system that is full: what fits is written, the rest gets an I/O error."""
    if os.getuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", small], check=True)
    try:
        image = small / "disk.img"
        image.touch()
        os.truncate(image, 16 << 20)
        vm, backend = scene.device_vm(), scene.backend(image)
        result, status, printed = ended(scene.sibling("--workload", "write", "--bs", "64k"))
        assert status == 1
        assert result["workload"]["errors"] > 0
        assert "Traceback" not in printed
        image_bytes = os.stat(image).st_blocks * 512
        assert 1 << 20 <= image_bytes <= 2 << 20
        assert scene.end(backend)[0] == 0
        scene.end(vm)
    finally:
        subprocess.run(["umount", small], check=True)
