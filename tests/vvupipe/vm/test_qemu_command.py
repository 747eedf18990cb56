import os
import socket
from itertools import pairwise
from pathlib import Path

import pytest

from tests.huge_pages_kit import KINDS, machine_with
from vvupipe.errors import UserError
from vvupipe.vm.qemu_binary import QemuBinary
from vvupipe.vm.qemu_command import (
    QemuSiblingOptions,
    VhostUserDisk,
    check_options,
    qemu_command,
)
from vvupipe.vm.qemu_machine import Serial, SharedDir, huge_ram, kernel_parameters, remove_console

QEMU = QemuBinary("/usr/bin/qemu", (7, 2, 0))


def command(binary=QEMU, on_terminal=False, **options):
    options.setdefault("vhost_user_blk", ())
    return qemu_command(QemuSiblingOptions(accel="tcg", **options), binary, 7, on_terminal=on_terminal)


def values(arguments, key):
    return [value for name, value in pairwise(arguments) if name == key]


def test_disks_become_devices_on_shared_memory():
    arguments = command(
        vhost_user_blk=(VhostUserDisk(Path("/a,b")), VhostUserDisk(Path("/c"), 4, 256, 1)), mem_mib=128, cpus=3
    )
    assert values(arguments, "-device")[-2:] == [
        "vhost-user-blk-pci,chardev=disk0",
        "vhost-user-blk-pci,chardev=disk1,num-queues=4,queue-size=256,bootindex=1",
    ]
    assert values(arguments, "-chardev")[-2:] == [
        "socket,id=disk0,path=/a,,b,reconnect=1",
        "socket,id=disk1,path=/c,reconnect=1",
    ]
    assert values(arguments, "-object") == ["memory-backend-memfd,id=ram,seal=off,size=128M,share=on"]
    assert values(arguments, "-machine") == ["q35,memory-backend=ram"]
    assert values(arguments, "-smp") == ["3"]
    assert "-no-reboot" in arguments


def test_a_new_qemu_counts_the_reconnect_in_milliseconds():
    arguments = command(QemuBinary("q", (9, 2, 0)), vhost_user_blk=(VhostUserDisk(Path("/c")),))
    assert values(arguments, "-chardev")[-1] == "socket,id=disk0,path=/c,reconnect-ms=1000"


@pytest.mark.parametrize("on_terminal", [True, False])
def test_only_a_terminal_shares_the_console_with_the_monitor(on_terminal):
    arguments = command(on_terminal=on_terminal)
    assert ("chardev:console" in values(arguments, "-monitor")) is on_terminal
    assert f"stdio,id=console,signal=off,mux={'on' if on_terminal else 'off'}" in values(arguments, "-chardev")


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ((), "console=ttyS0 panic=-1"),
        (("quiet", "root=/dev/vda ro"), "quiet root=/dev/vda ro console=ttyS0 panic=-1"),
        (("ro console=tty0",), "ro console=tty0 panic=-1"),
        (("panic=5 xconsole=1",), "panic=5 xconsole=1 console=ttyS0"),
    ],
)
def test_the_user_decides_on_console_and_panic(given, line):
    assert kernel_parameters(given) == line


def test_a_firmware_boot_has_no_kernel():
    arguments = command(restart_on_reset=True)
    assert not {"-kernel", "-append", "-initrd", "-no-reboot"} & set(arguments)


def check(**options):
    check_options(QemuSiblingOptions(**{"vhost_user_blk": (), **options}))


def test_good_options_pass(tmp_path):
    (tmp_path / "kernel").write_bytes(b"k")
    check(kernel=tmp_path / "kernel", initrd=tmp_path / "kernel", params=("quiet",))
    check(vhost_user_blk=(VhostUserDisk(Path("x" * 107)),))


def test_the_console_of_a_killed_vm_is_taken_over(tmp_path):
    path = tmp_path / "console"
    serial = Serial("unix", path)
    with socket.socket(socket.AF_UNIX) as console:
        console.bind(str(path))
        console.listen()
        with pytest.raises(UserError, match="exists already"):
            check(serial=serial)
        remove_console(serial)
        assert path.is_socket(), "somebody listens on it"
    check(serial=serial)
    remove_console(serial)
    assert not path.exists()
    remove_console(serial)


def test_a_name_is_a_name_whatever_it_looks_like():
    assert values(command(name="a=b,debug-threads=on"), "-name") == ["guest=a=b,,debug-threads=on"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": Path("none")}, "cannot read the kernel .*none: No such file.*package linux-image-amd64"),
        ({"kernel": Path(".")}, "cannot read the kernel .*: Is a directory"),
        ({"kernel": Path("empty")}, "kernel .*empty is empty"),
        ({"kernel": Path("k"), "initrd": Path("none")}, "cannot read the initrd .*build_initramfs"),
        ({"initrd": Path("k")}, "need a kernel"),
        ({"params": ("quiet",)}, "need a kernel"),
        ({"kernel": Path("k"), "params": ("x" * 2030,)}, "bytes of kernel parameters"),
        ({"mem_mib": 0}, "at least 1 MiB"),
        ({"cpus": 0}, "1 CPU"),
        ({"vhost_user_blk": (VhostUserDisk(Path("s")), VhostUserDisk(Path("./a/../s")))}, "one socket .* two disks"),
        ({"vhost_user_blk": (VhostUserDisk(Path("x" * 108)),)}, "too long: the limit is 107 bytes"),
        *(
            (
                {"vhost_user_blk": (VhostUserDisk(Path("s"), queue_size=size),)},
                f"--queue-size {size}: use a power of two",
            )
            for size in (-4, 0, 1, 100, 2048)
        ),
        ({"serial": Serial("unix", Path("x" * 108))}, "too long: the limit is 107 bytes"),
        ({"serial": Serial("unix", Path("/dev/null/s"))}, "--serial /dev/null/s: Not a directory"),
        ({"serial": Serial("unix", Path("/dev/null"))}, "/dev/null exists already"),
        ({"shared_dirs": (SharedDir(Path("x" * 300), "tag"),)}, "--shared-dir .*: File name too long"),
        ({"shared_dirs": (SharedDir(Path("/dev/null"), "tag"),)}, "--shared-dir /dev/null: no such folder"),
    ],
)
def test_what_cannot_start_is_one_line(tmp_path, options, message):
    (tmp_path / "k").write_bytes(b"k")
    (tmp_path / "empty").touch()
    options = {name: tmp_path / value if name in ("kernel", "initrd") else value for name, value in options.items()}
    with pytest.raises(UserError, match=message) as caught:
        check(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_huge_pages_are_a_file_that_qemu_inherits(kind):
    options = QemuSiblingOptions(accel="tcg", vhost_user_blk=(), mem_mib=32, hugepages=True)
    with machine_with(kind, 16), huge_ram(options) as ram:
        assert os.fstat(ram.fd).st_size == 32 << 20
        arguments = qemu_command(options, QEMU, 7, on_terminal=False, huge=ram)
    place = f"mem-path=/proc/self/fd/{ram.fd},align=2048K,size=32M,share=on"
    assert values(arguments, "-object") == [f"memory-backend-file,id=ram,{place}"]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(ram.fd)


def test_huge_pages_that_there_are_not():
    options = QemuSiblingOptions(vhost_user_blk=(), mem_mib=32, hugepages=True)
    with (
        machine_with("none"),
        pytest.raises(UserError, match=r"no huge pages for 32 MiB.*nr_hugepages="),
        huge_ram(options),
    ):
        pass
