"""What a device VM in QEMU is started with; tests/e2e runs them."""

import subprocess
import sys

import pytest

from vvupipe.errors import UserError
from vvupipe.vm.qemu_binary import QemuBinary
from vvupipe.vm.qemu_device_vm import choose_carrier


def fake_qemu(folder, devices):
    path = folder / "qemu"
    answer = "echo 'vfio-user-pci options:'" if "vfio-user-pci" in devices else "echo not found >&2"
    path.write_text(f"#!/bin/sh\n{answer}\n")
    path.chmod(0o755)
    return QemuBinary(str(path), (7, 2, 0))


def test_the_carrier_is_what_qemu_can(tmp_path):
    old = fake_qemu(tmp_path, [])
    assert choose_carrier("auto", old) == "ivshmem"
    with pytest.raises(UserError, match=r"QEMU 7\.2\.0 has no vfio-user-pci.*--carrier ivshmem"):
        choose_carrier("vfio-user", old)
    new = fake_qemu(tmp_path, ["vfio-user-pci"])
    assert choose_carrier("auto", new) == "vfio-user"
    assert choose_carrier("ivshmem", new) == "ivshmem"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--vvu-proxy", "s", "/nowhere/vmlinuz"], "cannot read the kernel /nowhere/vmlinuz"),
        (["--vvu-proxy", "s,shared-memory=3G", "@kernel"], "use a power of two from 1M to 64G"),
        (["--vvu-proxy", "s,shared-memory=128G", "@kernel"], "use a power of two from 1M to 64G"),
        (["--vvu-proxy", "s,shared-memory=much", "@kernel"], "shared-memory=much"),
        (["--vvu-proxy", "s,shared-memory=1G"], "shared-memory is for a VM with a KERNEL"),
        (["--vvu-proxy", "s,size=1G", "@kernel"], "use addr=VALUE, uuid=VALUE or shared-memory=VALUE, each once"),
        (["--vvu-proxy", "s,addr=00:1f.0", "@kernel"], "PCI address 0000:00:1f.0 is taken"),
        (["--vvu-proxy", "s,addr=00:10.0", "--vvu-proxy", "t,addr=00:10.0", "@kernel"], "is taken"),
        (["--vvu-proxy", "s", "--cpus", "0,1", "@kernel"], "number of vCPUs"),
        (["--vvu-proxy", "s", "--workload", "read", "@kernel"], "--workload does not go with"),
        (["--vvu-proxy", "s", "--block", "/nowhere.img", "@kernel"], "cannot read the image /nowhere.img"),
        (["--vvu-proxy", "s", "--shared-dir", "/nowhere:tag", "@kernel"], "/nowhere: no such folder"),
        (["--vvu-proxy", "s", "--qemu", "/nowhere/qemu", "@kernel"], "/nowhere/qemu is not installed"),
        (["--vvu-proxy", "s", "--block", "a.img"], "--block does not go with the embedded device VM"),
        (["--vhost-user-blk", "s", "--carrier", "ivshmem", "@kernel"], "--carrier goes with --vvu-proxy"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, monkeypatch, arguments, says):
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(b"kernel")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    arguments = [str(kernel) if word == "@kernel" else word for word in arguments]
    done = subprocess.run(
        [sys.executable, "-m", "vvupipe", "run", *arguments],
        capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert says in done.stderr
