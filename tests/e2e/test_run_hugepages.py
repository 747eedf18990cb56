"""`vvupipe run --hugepages`: data is right, pages are really huge in every process that maps them, nothing is left."""

import hashlib
import json
import os
import subprocess
import sys
import time

import guest_kit
import psutil
import pytest

from tests.huge_pages_kit import KINDS, PAGE, machine_with, mapped, meminfo

pytestmark = pytest.mark.timeout(180)

MEM_MIB = 32
PAGES = 3 * MEM_MIB // 2  # device VM and sibling, and some to spare


@pytest.fixture(params=KINDS)
def kind(request):
    with machine_with(request.param, PAGES):
        yield request.param


def sibling(scene, *work):
    return scene.sibling("--hugepages", "--mem", MEM_MIB, *work)


def ended(process):
    printed, _ = process.communicate(timeout=90)
    assert process.returncode == 0, printed
    return json.loads(printed.splitlines()[-1])


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def whole_family(process):
    return [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]


def moved_right(scene, image, kind, folder):
    """Every way in which the sibling moves data."""
    found = ended(sibling(scene, "--sha256", "--workload", "verify", "--size", "8m", "--bs", "64k"))
    assert found["ram"] == {"size_bytes": MEM_MIB << 20, "pages": f"huge pages (2 MiB), {kind}"}
    assert (found["workload"]["mismatches"], found["workload"]["errors"]) == (0, 0)
    assert found["workload"]["verified_blocks"] == 128
    assert found["sha256"] == sha256(image)
    new = folder / "new.img"
    new.write_bytes(os.urandom(16 << 20))
    ended(sibling(scene, "--copy-in", new))
    assert image.read_bytes() == new.read_bytes()
    ended(sibling(scene, "--copy-out", folder / "out.img"))
    assert (folder / "out.img").read_bytes() == new.read_bytes()


def huge_where_mapped(scene, kind, backend):
    """The pages that a workload uses, as the vCPU and the back-end's workers have them."""
    process = sibling(scene, "--workload", "randread", "--bs", "64k", "--iodepth", "64", "--runtime", "4s")
    time.sleep(2.5)
    seen = {pid: mapped(pid, kind, "vvupipe-sibling") for pid in (*whole_family(process), *whole_family(backend))}
    ended(process)
    users = [huge for touched, huge in seen.values() if touched >= 2 * PAGE]
    assert len(users) >= 2, f"a vCPU and a worker: {seen}"
    assert all(touched == huge for touched, huge in seen.values()), seen


def test_embedded_sibling_over_a_socket(kind, scene, image, tmp_path):
    free = meminfo("HugePages_Free")
    options = ("--socket", scene.socket, "--file", image, "--json")
    backend = scene.start("device", "block", *options)
    moved_right(scene, image, kind, tmp_path)
    huge_where_mapped(scene, kind, backend)
    assert scene.end(backend)[0] == 0
    assert not scene.left_behind()
    assert meminfo("HugePages_Free") == free


def test_through_a_device_vm(kind, scene, image, tmp_path):
    free = meminfo("HugePages_Free")
    vm = scene.device_vm("--hugepages", "--mem", MEM_MIB)
    description = json.loads((scene.folder / "vvupipe" / scene.name / "vm.json").read_text())
    assert description["ram_pages"] == f"huge pages (2 MiB), {kind}"
    backend = scene.backend(image)
    moved_right(scene, image, kind, tmp_path)
    huge_where_mapped(scene, kind, backend)
    touched, huge = mapped(backend.pid, kind, f"vvupipe-{os.getuid()}-{scene.name}-")
    assert touched == huge == PAGE, "the program's slot of the device VM's RAM"
    assert scene.end(backend)[0] == 0
    assert scene.end(vm)[0] == 0
    assert not scene.left_behind()
    assert meminfo("HugePages_Free") == free


def test_killed_ones_leave_no_memory(kind, scene, image):
    free, unpromised = meminfo("HugePages_Free"), meminfo("HugePages_Rsvd")
    vm = scene.device_vm("--hugepages", "--mem", MEM_MIB)
    backend = scene.backend(image)
    work = sibling(scene, "--workload", "randread", "--runtime", "30s")
    time.sleep(2)
    vcpus = psutil.Process(work.pid).children()
    for process in (work, vm):
        scene.kill(process)
    psutil.wait_procs(vcpus, 10)
    backend.communicate(timeout=20)
    assert (meminfo("HugePages_Free"), meminfo("HugePages_Rsvd")) == (free, unpromised)
    again = scene.device_vm("--hugepages", "--mem", MEM_MIB)
    backend = scene.backend(image)
    assert ended(sibling(scene, "--sha256"))["sha256"] == sha256(image)
    scene.end(backend)
    scene.end(again)
    assert not scene.left_behind()


@pytest.mark.parametrize("side", [["--vvu-proxy", "{}/s,addr=00:10.0"], ["--vhost-user-blk", "{}/s"]])
def test_no_huge_pages_is_one_line(scene, side):
    with machine_with("none"):
        done = scene.run("run", "--hugepages", *(word.format(scene.folder) for word in side))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled" in done.stderr
    assert "sysctl vm.nr_hugepages=" in done.stderr
    assert not scene.left_behind()


def test_usual_pages_are_told_as_well(scene, image):
    options = ("--socket", scene.socket, "--file", image, "--json")
    backend = scene.start("device", "block", *options)
    assert ended(scene.sibling())["ram"] == {"size_bytes": 128 << 20, "pages": "pages of 4 KiB"}
    scene.end(backend)


@pytest.mark.qemu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transport", ["socket", "device VM"])
def test_linux_guest(kind, transport, qemu, scene, image, tmp_path):
    initrd = tmp_path / "initrd"
    script = "sha256sum /dev/vda; echo looked; sleep 8"
    initrd.write_bytes(guest_kit.base_initramfs() + guest_kit.initramfs.script_overlay(script))
    with machine_with(kind, 256 // 2):
        vm = None
        if transport == "socket":
            backend = scene.start("device", "block", "--socket", scene.socket, "--file", image, "--json")
        else:
            vm = scene.device_vm()
            backend = scene.backend(image)
        guest = subprocess.Popen(
            [
                *(sys.executable, "-m", "vvupipe", "run", "--vhost-user-blk", scene.socket, "--hugepages"),
                *(guest_kit.kernel().image, "--initrd", initrd, "--mem", "256", "--accel", "tcg"),
            ],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=scene.environment,
        )  # fmt: skip
        try:
            said = ""
            while "looked" not in said:
                line = guest.stdout.readline()
                assert line, said
                said += line
            assert sha256(image) in said
            touched, huge = mapped(whole_family(guest)[1], kind, "vvupipe-guest")
            assert touched == huge >= 16 << 20
            in_workers = [mapped(pid, kind, "vvupipe-guest") for pid in whole_family(backend)]
            assert sum(huge for _, huge in in_workers) >= PAGE
            assert all(touched == huge for touched, huge in in_workers), in_workers
            rest, _ = guest.communicate(timeout=60)
            assert guest.returncode == 0, said + rest
        finally:
            if guest.poll() is None:
                guest.kill()
                guest.communicate()
        scene.end(backend)
        if vm:
            scene.end(vm)
        assert not scene.left_behind()
