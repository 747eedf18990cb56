"""The firmware drives the disk before the guest does: start, stop, start on one connection."""

import pytest
from boot_sector import SECTOR, bootable_image
from guest_kit import boot_guest, packed_kernel
from vhost_user_relay import Relay

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(180)]

SIZE = 4 << 20


def test_firmware_boots_from_the_disk_and_again_after_a_reset(backend_factory, tmp_path):
    image = tmp_path / "boot.img"
    image.write_bytes(bootable_image("booted from vhost-user ", 3, SIZE))
    with backend_factory(image, tmp_path) as backend, Relay(tmp_path / "relay.sock", backend.socket) as relay:
        disk = {"socket_path": tmp_path / "relay.sock", "num_queues": backend.queues, "bootindex": 0}
        end = boot_guest(tmp_path, [disk], firmware_only=True, restart_on_reset=True)
    assert end.status == 0, end
    assert [line.strip() for line in end.console.splitlines() if "booted" in line] == [
        f"booted from vhost-user {boot}" for boot in range(3)
    ], end
    assert image.read_bytes()[SECTOR] == 3  # the firmware's last write was done before the power went off
    story = relay.starts_and_stops()
    assert story.count("start") == 3, story
    stops = [entry[1] for entry in story if entry != "start"]
    # Each boot reads the boot sector, reads sector 1 and writes it: the reset began the ring's count again.
    assert len(stops) == 3, story
    assert all(requests >= 3 for requests in stops), story
    assert {entry.stay for entry in relay.entries} == {0}


def test_linux_takes_the_disk_over_from_the_firmware(backend_factory, tmp_path):
    image = tmp_path / "disk.img"
    image.write_bytes(b"hello from sector 0".ljust(SIZE, b"\0"))
    script = "head -c 19 /dev/vda; echo; echo written | dd of=/dev/vda bs=512 seek=1 conv=sync,fsync 2>/dev/null"
    with backend_factory(image, tmp_path) as backend, Relay(tmp_path / "relay.sock", backend.socket) as relay:
        disk = {"socket_path": tmp_path / "relay.sock", "num_queues": backend.queues}
        # SeaBIOS does not look at disks before it starts an unpacked kernel.
        end = boot_guest(tmp_path, [disk], script, kernel=str(packed_kernel().image))
    assert end.status == 0, end
    assert end.script_status == 0, end
    assert "hello from sector 0" in end.console
    assert image.read_bytes()[SECTOR : SECTOR + 8] == b"written\n"
    story = relay.starts_and_stops()
    assert [entry if entry == "start" else "stop" for entry in story] == ["start", "stop"] * 2, story
    # Both phases drove the ring: SeaBIOS reads the disk's first sector even when it boots another way.
    assert all(requests >= 1 for _, requests in story[1::2]), story
    assert {entry.stay for entry in relay.entries} == {0}
