import pytest

from vvupipe.errors import UserError
from vvupipe.vm import qemu_binary
from vvupipe.vm.qemu_binary import accelerator_arguments, find_qemu, kvm_usable

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
def program(tmp_path, monkeypatch):
    """`program(text)` puts a QEMU that answers `text` on PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def make(text, status=0):
        path = tmp_path / qemu_binary.PROGRAM
        path.write_text(f"#!/bin/sh\necho '{text}'\nexit {status}\n")
        path.chmod(0o755)
        return str(path)

    return make


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)", (7, 2, 22)),
        ("QEMU emulator version 10.1.0", (10, 1, 0)),
        ("QEMU emulator version 8.0", (8, 0, 0)),
    ],
)
def test_version_is_read(program, text, version):
    path = program(text)
    assert find_qemu() == qemu_binary.QemuBinary(path, version)
    assert find_qemu(path).version == version


def test_too_old(program):
    program("QEMU emulator version 6.2.0")
    with pytest.raises(UserError, match=r"is QEMU 6\.2\.0, too old: 7\.2 or newer is needed"):
        find_qemu()


def test_not_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="install the package qemu-system-x86"):
        find_qemu()
    with pytest.raises(UserError, match="my-qemu is not installed"):
        find_qemu("my-qemu")


@pytest.mark.parametrize(("text", "status"), [("something else", 0), ("QEMU emulator version 7.2.0", 1)])
def test_not_a_qemu(program, text, status):
    program(text, status)
    with pytest.raises(UserError, match="does not say its version"):
        find_qemu()


def test_not_a_program(program):
    path = program("x")
    with open(path, "wb") as file:
        file.write(b"\x7fELF nonsense")
    with pytest.raises(UserError, match="does not run"):
        find_qemu()


@pytest.mark.parametrize(
    ("flags", "device", "usable"),
    [("fpu vmx sse", True, True), ("fpu svm", True, True), ("fpu vmxnet", True, False), ("fpu vmx", False, False)],
)
def test_kvm_needs_the_device_and_the_cpu(tmp_path, flags, device, usable):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    kvm = tmp_path / "kvm"
    if device:
        kvm.touch()
    assert kvm_usable(kvm, cpuinfo) is usable


def test_accelerators(monkeypatch):
    monkeypatch.setattr(qemu_binary, "kvm_usable", lambda: True)
    assert accelerator_arguments("auto")[1] == accelerator_arguments("kvm")[1] == "kvm"
    assert accelerator_arguments("tcg") == ["-accel", "tcg,thread=multi", "-cpu", "max"]
    monkeypatch.setattr(qemu_binary, "kvm_usable", lambda: False)
    assert accelerator_arguments("auto")[1] == "tcg,thread=multi"
    with pytest.raises(UserError, match="KVM cannot be used here"):
        accelerator_arguments("kvm")
