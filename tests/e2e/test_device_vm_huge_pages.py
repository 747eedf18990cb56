"""A real device VM whose RAM is in huge pages, as is that of its sibling, which it sees in a window."""

import hashlib
import json
import os
import subprocess

import psutil
import pytest
from device_vm_guest import VVUPIPE, DeviceVm

from tests.huge_pages_kit import PAGE, machine_with, mapped

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(400)]

ADDRESS = "0000:00:10.0"
VM_MIB, SIBLING_MIB = 512, 32


def test_both_vms(tmp_path):
    """Reserved ones: transparent ones, which differ in how memory is asked for only, have tests with other VMs."""
    kind = "reserved"
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(8 << 20))
    proxies = {ADDRESS: tmp_path / "a.sock"}
    with (
        machine_with(kind, (VM_MIB + 2 * SIBLING_MIB << 20) // PAGE),
        DeviceVm(tmp_path, proxies, "--hugepages", mem=VM_MIB) as vm,
    ):
        assert f"{VM_MIB} MiB of RAM in huge pages (2 MiB), {kind}" in vm.said
        qemu = psutil.Process(vm.process.pid).children()[0].pid
        touched, huge = mapped(qemu, kind, "vvupipe-guest")
        assert touched == huge >= 64 << 20
        pid = vm.start_backend(ADDRESS, image.name)
        work = ["--workload", "verify", "--size", "2m", "--bs", "64k", "--sha256", "--json"]
        verify = ["run", "--vhost-user-blk", proxies[ADDRESS], "--hugepages", "--mem", SIBLING_MIB, *work]
        done = subprocess.run(
            [*VVUPIPE, *map(str, verify)], env=vm.environment, capture_output=True, text=True, timeout=150, check=False
        )
        assert done.returncode == 0, (done.stdout, done.stderr, vm.said)
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["ram"]["pages"] == f"huge pages (2 MiB), {kind}"
        assert (found["workload"]["verified_blocks"], found["workload"]["mismatches"]) == (32, 0)
        assert found["sha256"] == hashlib.sha256(image.read_bytes()).hexdigest()
        assert f"the VM sees {SIBLING_MIB} MiB of a sibling's memory" in vm.said
        vm.check(f"kill {pid} && wait {pid}")
        assert vm.end() == 0, vm.said
