#!/usr/bin/env python3
"""Show vvupipe with two real VMs in stock QEMU: device VM, back-end in it, sibling VM with the disk mounted.

The device VM boots the distribution's kernel and enters the host's own root (read-only, over 9p), so that the vvupipe
of this checkout runs in it. On a terminal you get a shell in the sibling, where /dev/vda is mounted at /mnt; otherwise
(or with --check) the sibling copies files there and the image is checked from outside. All ends with the sibling.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import build_initramfs
import demonstration

ROOT = Path(__file__).resolve().parent.parent
ADDRESS = "0000:00:10.0"
VVUPIPE = [sys.executable, "-P", "-m", "vvupipe"]
_SERVING_S = 120

DEVICE_VM = """
lspci -s {short}
{vvupipe} device block --vfio {address} --bind --file /images/{image}
"""

MOUNT = """
mount -t ext4 /dev/vda /mnt || exit 1
df -h /mnt
"""
SHELL = (
    MOUNT
    + """
echo "The disk of this VM, /dev/vda at /mnt, is served by a process in the device VM. 'exit' ends both."
cd /mnt && setsid cttyhack sh; cd /
umount /mnt
"""
)
CHECK = (
    MOUNT
    + """
cp -r /modules /bin/busybox /mnt && sync || exit 1
umount /mnt
echo "sibling-sha256 $(sha256sum </dev/vda)"
"""
)


def say(text: str) -> None:
    """A heading."""
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def show(command: list[str]) -> None:
    """The command as a user types it."""
    print(f"$ vvupipe {shlex.join(command)}", flush=True)


def make_image(path: Path, size_mib: int) -> None:
    """An empty ext4 file system."""
    mkfs = shutil.which("mkfs.ext4", path=f"{os.environ.get('PATH', '')}:/sbin:/usr/sbin")
    if not mkfs:
        sys.exit("mkfs.ext4 is not installed: install the package e2fsprogs")
    with path.open("wb") as file:
        file.truncate(size_mib << 20)
    subprocess.run([mkfs, "-q", "-L", "vvupipe", path], check=True)


def compile_kernels(folder: Path) -> None:
    """Have the kernels in the cache: compiled here that takes seconds, in an emulated guest minutes."""
    image = folder / "empty.img"
    with image.open("wb") as file:
        file.truncate(1 << 20)
    command = [*VVUPIPE, "device", "block", "--file", str(image), "--socket", str(folder / "compile.socket")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        ready = process.stdout.readline()
        process.terminate()
    if not ready:
        sys.exit(process.returncode)


@contextlib.contextmanager
def device_vm(command: list[str], log: Path) -> Iterator[None]:
    """The device VM; entered when the back-end in it serves. Its console goes to `log`."""
    show(command)
    with log.open("wb") as output:
        process = subprocess.Popen([*VVUPIPE, *command], stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            deadline = time.monotonic() + _SERVING_S
            seen = ""
            while "serving " not in seen:
                if process.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"the device VM does not serve:\n{log.read_text(errors='replace')}")
                time.sleep(0.1)
                text = log.read_text(errors="replace").replace("\r", "")
                for line in text[len(seen) : text.rfind("\n") + 1].splitlines():
                    print(f"  {line}", flush=True)
                seen = text[: text.rfind("\n") + 1]
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(20)


def main() -> int:
    """Run the scene; 0 when the sibling ended well and, with --check, what it read is what the image holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="no shell: copy files in the sibling and check the image")
    parser.add_argument("--image", type=Path, help="the disk, with an ext4 file system  [default: a new one]")
    parser.add_argument("--size", type=int, default=256, metavar="MiB", help="size of the new one")
    parser.add_argument("--mem", type=int, default=512, metavar="MiB", help="RAM of each VM")
    parser.add_argument("--qemu", help="QEMU for the device VM  [default: qemu-system-x86_64]")
    options = parser.parse_args()
    check = options.check or not sys.stdin.isatty()
    try:
        kernel = build_initramfs.newest_kernel()
        with tempfile.TemporaryDirectory(prefix="vvupipe-demo-") as folder:
            return scene(options, kernel, Path(folder), check=check)
    except build_initramfs.MissingPart as error:
        print(f"real_demo: {error}", file=sys.stderr)
        return 2


def scene(options: argparse.Namespace, kernel: build_initramfs.Kernel, folder: Path, *, check: bool) -> int:
    """Everything, with files in `folder`."""
    from vvupipe.workers import kernel_cache

    os.environ["XDG_RUNTIME_DIR"] = str(folder)
    image = options.image.resolve() if options.image else folder / "disk.img"
    if not options.image:
        make_image(image, options.size)
    compile_kernels(folder)
    script = DEVICE_VM.format(
        address=ADDRESS, short=ADDRESS[5:], image=shlex.quote(image.name), vvupipe=shlex.join(VVUPIPE)
    )
    inside, sibling = folder / "device-vm.initramfs", folder / "sibling.initramfs"
    inside.write_bytes(build_initramfs.build(kernel, script=script, host_root=True))
    sibling.write_bytes(build_initramfs.build(kernel, script=CHECK if check else SHELL))
    socket = f"{folder}/vhost-user.socket"
    parameters = f"quiet vvupipe.share=images:/images vvupipe.cwd={ROOT} vvupipe.env=PYTHONPATH={ROOT}"
    parameters += f" vvupipe.env=VVUPIPE_CACHE_DIR={kernel_cache.folder().parent}"
    qemu = ["--qemu", options.qemu] if options.qemu else []
    say("Device VM, whose root is this machine's, and in it the back-end on the VVU function")
    device = [
        "run", "--vvu-proxy", f"{socket},addr={ADDRESS}", "--name", "device-vm", "--mem", str(options.mem), *qemu,
        "--shared-dir", "/:host:ro=true", "--shared-dir", f"{image.parent}:images", "--initrd", str(inside),
        "-p", parameters, str(kernel.image),
    ]  # fmt: skip
    with device_vm(device, folder / "device-vm.log"):
        say("Sibling VM: its /dev/vda is that disk")
        command = [
            "run", "--vhost-user-blk", socket, "--mem", str(options.mem), "--initrd", str(sibling), "-p", "quiet",
            str(kernel.image),
        ]  # fmt: skip
        show(command)
        if not check:
            return subprocess.run([*VVUPIPE, *command], check=False).returncode
        done = subprocess.run([*VVUPIPE, *command], check=False, stdout=subprocess.PIPE, text=True)
        print(done.stdout)
    found = re.search(r"^sibling-sha256 (\w+)", done.stdout, re.MULTILINE)
    held = subprocess.run(["sha256sum", image], check=True, stdout=subprocess.PIPE, text=True).stdout.split()[0]
    fsck = subprocess.run(
        ["fsck.ext4", "-fn", image], check=False, env={**os.environ, "PATH": os.environ["PATH"] + ":/sbin"}
    )
    print(f"  sibling  {found[1] if found else 'ended without a digest'}\n  image    {held}")
    equal = done.returncode == 0 and found is not None and found[1] == held and fsck.returncode == 0
    say("Equal, and the file system is clean." if equal else "DIFFERENT: see above.")
    return int(not equal)


if __name__ == "__main__":
    demonstration.run(main, "real_demo")
