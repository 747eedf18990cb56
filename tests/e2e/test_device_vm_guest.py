"""The whole scene with two real guests: the back-end runs in one of them and serves the other."""

import contextlib
import hashlib
import json
import os
import subprocess

import pytest
from device_vm_guest import VVUPIPE, DeviceVm, guest_command, make_image
from guest_kit import Guest, initramfs, kernel
from sibling_scripts import COUNT_SCRIPT, TREE_SCRIPT

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(400)]

ADDRESS, OTHER = "0000:00:10.0", "0000:00:11.0"
MIB = 1 << 20
SBIN = {**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def sibling(vm, address, script, **options):
    return Guest(vm.folder, [vm.sockets[address]], script, env=vm.environment, **options)


@pytest.fixture(scope="module")
def vm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scene")
    proxies = {ADDRESS: folder / "a.sock", OTHER: folder / "b.sock"}
    disk = ["--block", make_image(folder, "disk.img", 64 * MIB), "-p", "virtio_blk.poll_queues=1"]
    with DeviceVm(folder, proxies, "--trace", folder / "trace.txt", *disk) as vm:
        yield vm


def test_the_guest_sees_both_functions(vm):
    line = vm.check("lspci -s 00:10.0").strip()
    assert line == "00:10.0 RAM memory: Red Hat, Inc. Inter-VM shared memory (rev 01)"
    serve = guest_command("device", "block", "--vfio", ADDRESS, "--file", "/share/missing.img")
    vm.check(f"{{ {serve} >/share/missing.log 2>&1; echo $? >/share/missing.status; }} & true")
    listed = [json.loads(line) for line in vm.check(guest_command("device", "list", "--json")).splitlines()]
    assert [entry["address"] for entry in listed] == [ADDRESS, OTHER]
    assert all("--bind" in entry["state"] for entry in listed)
    vm.check("wait")
    assert (vm.folder / "missing.status").read_text() == "2\n"
    assert "missing.img" in (vm.folder / "missing.log").read_text()


def front_ends_that_bring_their_own_memory(vm, digest):
    # Sealed, as memory-backend-memfd is by default.
    assert digest in digest_read_by(vm, "memory-backend-memfd", 256), vm.said
    # Sealed and no power of two: refused with what to do; unsealed it is rounded up.
    with foreign_guest(vm, "memory-backend-memfd", 192):
        vm.wait_for("give the front-end a power of two of memory (-m 256M), or seal=off", 30, stream="err")
    assert digest in digest_read_by(vm, "memory-backend-memfd,seal=off", 192), vm.said


def test_a_file_system_made_by_the_sibling_and_read_by_front_ends_that_vvupipe_did_not_start(vm):
    image = make_image(vm.folder, "tree.img", 48 * MIB)
    pid = vm.start_backend(ADDRESS, "tree.img")
    # More RAM than the device VM has.
    with sibling(vm, ADDRESS, TREE_SCRIPT, mem_mib=1024) as guest:
        end = guest.wait(120)
    assert (end.status, end.script_status) == (0, 0), (end, vm.said)
    assert end.word("disk").split()[0] == sha256(image.read_bytes())
    fsck = subprocess.run(["fsck.ext4", "-fn", image], capture_output=True, text=True, env=SBIN, check=False)
    assert fsck.returncode == 0, fsck.stdout + fsck.stderr
    front_ends_that_bring_their_own_memory(vm, sha256(image.read_bytes()))
    vm.check(f"kill {pid} && wait {pid}")
    text = vm.backend_log.read_text()
    assert '"event": "stopped"' in text
    assert "compiling" not in text  # the kernels are those that the host compiled
    # --bind was undone.
    assert vm.run(f"readlink /sys/bus/pci/devices/{ADDRESS}/driver")[0] == 1


def interrupts_of_the_disk(vm):
    lines = vm.check("grep virtio0-req /proc/interrupts").splitlines()
    return sum(int(count) for line in lines for count in line.split()[1:3])


def test_two_siblings_at_once_one_with_memory_of_its_own_and_a_disk_that_is_polled(vm):
    """The guest has what the host seldom has, a device with polled queues: its own virtual disk."""
    make_image(vm.folder, "a.img", 64 * MIB)
    polled = ["--file", "/dev/vda", "--direct", "--iopoll"]
    pids = vm.start_backends({ADDRESS: ["--file", "/share/a.img"], OTHER: polled})
    before = interrupts_of_the_disk(vm)
    with sibling(vm, ADDRESS, COUNT_SCRIPT) as guest:
        # The embedded sibling's RAM is POSIX shared memory that is plugged into the running VM.
        verify = ["run", "--vhost-user-blk", vm.sockets[OTHER], "--workload", "verify", "--runtime", "3s", "--json"]
        done = subprocess.run(
            [*VVUPIPE, *map(str, verify)], env=vm.environment, capture_output=True, text=True, timeout=90, check=False
        )
        end = guest.wait(120)
    assert done.returncode == 0, (done.stdout, done.stderr, vm.said)
    assert (end.status, end.script_status) == (0, 0), (end, vm.said)
    assert "MiB of a sibling's memory" in vm.said
    found = json.loads(done.stdout)["workload"]
    assert (found["ok"], found["verified_blocks"] > 500) == (True, True), found
    # A flush is an interrupt, and those requests whose memory could not be pinned, before it was copied.
    assert interrupts_of_the_disk(vm) - before < found["flushes"] + 100
    vm.check(f"kill {' '.join(map(str, pids))}; wait")


def foreign_front_end(folder, socket, memory, mem_mib, script):
    """A QEMU that vvupipe did not start, as a command line."""
    initrd = folder / "foreign.initramfs"
    initrd.write_bytes(initramfs.build(kernel(), script=script))
    return [
        "qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-nodefaults", "-display", "none", "-no-reboot",
        "-m", f"{mem_mib}M", "-object", f"{memory},id=ram,size={mem_mib}M,share=on", "-machine", "memory-backend=ram",
        "-chardev", f"socket,id=disk,path={socket}", "-device", "vhost-user-blk-pci,chardev=disk",
        "-serial", "stdio", "-kernel", kernel().image, "-initrd", initrd, "-append", "console=ttyS0 quiet panic=-1",
    ]  # fmt: skip


@contextlib.contextmanager
def foreign_guest(vm, memory, mem_mib):
    script = "dd if=/dev/vda bs=64k 2>/dev/null | sha256sum"
    command = foreign_front_end(vm.folder, vm.sockets[ADDRESS], memory, mem_mib, script)
    process = subprocess.Popen(
        list(map(str, command)), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def digest_read_by(vm, memory, mem_mib):
    with foreign_guest(vm, memory, mem_mib) as process:
        return process.communicate(timeout=90)[0]


def test_the_device_vm_ends_in_order(vm):
    assert vm.end() == 0
    runtime = vm.folder / "runtime" / "vvupipe"
    assert [path.name for path in runtime.iterdir() if path.name != ".lock"] == []
    assert not any(path.exists() for path in vm.sockets.values())
    assert [name for name in os.listdir("/dev/shm") if f"-{vm.process.pid}-" in name] == []


def test_the_trace_tells_of_every_sibling(vm):
    lines = (vm.folder / "trace.txt").read_text().splitlines()
    for address in (ADDRESS, OTHER):
        mine = [line.split(maxsplit=2)[2] for line in lines if line.split()[1] == address]
        came = [line for line in mine if line.startswith("--- front-end")]
        assert came
        assert len([line for line in mine if line.startswith("+++ front-end")]) == len(came)
        assert any("SET_VRING_KICK(vring=0, fd=<eventfd>)" in line for line in mine)
    assert len(lines) == len([line for line in lines if line.split()[1] in (ADDRESS, OTHER)])
