"""A real guest started by the very command line of the README."""

import hashlib
import os
import subprocess
import sys

import guest_kit
import pytest
from embedded import Scene

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(150)]


def test_sibling_by_its_command_line(qemu, tmp_path):
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(4 << 20))
    initrd = tmp_path / "initrd"
    script = "head -c 4096 /dev/vda | sha256sum; cat /proc/cmdline; cat /sys/block/vda/serial; echo; nproc"
    initrd.write_bytes(guest_kit.base_initramfs() + guest_kit.initramfs.script_overlay(script))
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    scene = Scene(folder)
    try:
        vm, backend = scene.device_vm(), scene.backend(image)
        arguments = [
            "--initrd",
            initrd,
            "-p",
            "quiet",
            "-p",
            "word=mine",
            "--mem",
            "256",
            "--cpus",
            "2",
            "--accel",
            "tcg",
        ]
        guest = subprocess.run(
            [
                *(sys.executable, "-m", "vvupipe", "run", "--vhost-user-blk", f"{scene.socket},num-queues=2"),
                *(str(guest_kit.packed_kernel().image), *map(str, arguments)),
            ],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            env=scene.environment,
            timeout=120,
            check=False,
        )
        assert guest.returncode == 0, guest
        assert hashlib.sha256(image.read_bytes()[:4096]).hexdigest() in guest.stdout
        assert "word=mine" in guest.stdout
        assert "vvu-" in guest.stdout
        assert "\n2\n" in guest.stdout.replace("\r", "")
        scene.end(backend)
        scene.end(vm)
        assert not scene.left_behind()
    finally:
        scene.close()
