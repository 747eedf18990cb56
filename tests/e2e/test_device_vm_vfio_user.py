"""The device VM in a QEMU that has a vfio-user client: the guest sees the VVU function itself."""

import pytest
from device_vm_guest import DeviceVm, make_image
from guest_kit import Guest
from sibling_scripts import COUNT_BYTES, COUNT_SCRIPT

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(400)]

ADDRESS = "0000:00:10.0"


@pytest.fixture(scope="module")
def vm(new_qemu, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vfio-user")
    with DeviceVm(folder, {ADDRESS: folder / "a.sock"}, "--qemu", new_qemu) as vm:
        yield vm


def test_lspci_shows_the_function(vm):
    line = vm.check("lspci -s 00:10.0").strip()
    assert line == "00:10.0 Unclassified device [00ff]: Red Hat, Inc. Device 107d (rev 01)"
    assert "by vfio-user (1af4:107d)" in vm.said
    assert "flr" in vm.check(f"cat /sys/bus/pci/devices/{ADDRESS}/reset_method")


def test_the_sibling_of_a_killed_back_end_is_told_and_comes_back(vm):
    image = make_image(vm.folder, "count.img", 64 << 20)
    pid = vm.start_backend(ADDRESS, "count.img")
    with Guest(vm.folder, [vm.sockets[ADDRESS]], COUNT_SCRIPT, env=vm.environment) as guest:
        guest.wait_for("flushed 3")
        start = len(vm.said)
        vm.check(f"kill -9 {pid}; wait {pid}; true")
        # Linux resets the function of a process that died.
        vm.wait_for("the back-end is down", 10, stream="err", start=start)
        vm.start_backend(ADDRESS, "count.img")
        end = guest.wait(120)
    assert (end.status, end.script_status) == (0, 0), (end, vm.said)
    assert image.read_bytes()[24 * COUNT_BYTES :][:COUNT_BYTES] == bytes([24]) * COUNT_BYTES


def test_the_vm_ends_in_order(vm):
    assert vm.end() == 0
    assert not vm.sockets[ADDRESS].exists()
