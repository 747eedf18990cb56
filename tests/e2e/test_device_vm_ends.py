"""What a sibling sees of the ends that a real device VM and the back-end in it can come to."""

import psutil
import pytest
from device_vm_guest import DeviceVm, make_image
from guest_kit import Guest
from sibling_scripts import COUNT_BYTES, COUNT_SCRIPT

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(400)]

ADDRESS = "0000:00:10.0"


def test_a_sibling_survives_whatever_happens_to_its_back_end(tmp_path):
    """Killed back-end, reset device VM, killed device VM, each in the middle of writes."""
    image = make_image(tmp_path, "count.img", 64 << 20)
    proxies = {ADDRESS: tmp_path / "a.sock"}
    with DeviceVm(tmp_path, proxies) as vm:
        pid = vm.start_backend(ADDRESS, "count.img")
        with Guest(tmp_path, [vm.sockets[ADDRESS]], COUNT_SCRIPT, env=vm.environment) as guest:
            guest.wait_for("flushed 3")
            vm.check(f"kill -9 {pid}; wait {pid}; true")
            vm.wait_for("its driver's process died", 10, stream="err")
            vm.start_backend(ADDRESS, "count.img")

            guest.wait_for("flushed 8")
            vm.type("echo b >/proc/sysrq-trigger")  # at once, with nobody told
            vm.rebooted()
            vm.start_backend(ADDRESS, "count.img")

            guest.wait_for("flushed 13")
            qemu = [child for child in psutil.Process(vm.process.pid).children() if "qemu" in child.name()]
            assert qemu
            vm.kill()
            assert not psutil.wait_procs(qemu, timeout=10)[1]
            flushed = guest.console.count("flushed")
            data = image.read_bytes()
            for number in range(1, flushed + 1):
                block = data[number * COUNT_BYTES : (number + 1) * COUNT_BYTES]
                assert block == bytes([number]) * COUNT_BYTES, number
            with DeviceVm(tmp_path, proxies) as second:
                second.start_backend(ADDRESS, "count.img")
                end = guest.wait(120)
    assert (end.status, end.script_status) == (0, 0), (end, second.said)
