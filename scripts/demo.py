#!/usr/bin/env python3
"""Show vvupipe's main job: device VM, back-end on its VVU function, sibling VM with the disk; all embedded.

Runs the very commands that a user would type, each in a process of its own, prints them and what they say, and
compares the sha256 that the sibling reads with the image file's. Exit status 0 only if they are equal.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import demonstration

ADDRESS = "0000:00:10.0"
VVUPIPE = [sys.executable, "-P", "-m", "vvupipe"]
_SECTOR = 512


def make_image(path: Path, size_mib: int) -> None:
    """A disk with an ext4 file system where mke2fs is installed, else with an MBR partition table, and random data."""
    size = size_mib << 20
    with path.open("wb") as file:
        file.truncate(size)
    mke2fs = shutil.which("mke2fs", path=f"{os.environ.get('PATH', '')}:/sbin:/usr/sbin")
    if mke2fs:
        subprocess.run([mke2fs, "-q", "-t", "ext4", "-L", "vvupipe-demo", path], check=True)
    else:
        # One Linux partition from 1 MiB on: status, CHS, type, CHS, first sector, sectors; then the signature.
        first = (1 << 20) // _SECTOR
        entry = struct.pack("<B3sB3sII", 0, b"\xfe\xff\xff", 0x83, b"\xfe\xff\xff", first, size // _SECTOR - first)
        with path.open("r+b") as file:
            file.seek(446)
            file.write(entry.ljust(64, b"\0") + b"\x55\xaa")
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(random.randbytes(min(size // 4, 64 << 20)))


def say(text: str) -> None:
    """A heading."""
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def show(arguments: list[str]) -> None:
    """The command as a user types it."""
    print(f"$ vvupipe {' '.join(arguments)}", flush=True)


@contextlib.contextmanager
def running(arguments: list[str]) -> Iterator[None]:
    """A long-running command; entered when it has said that it is ready."""
    show(arguments)
    process = subprocess.Popen([*VVUPIPE, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        line = process.stdout.readline()
        if not line:
            sys.exit(process.wait() or 1)
        print(f"  {line}", end="", flush=True)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)


def run(arguments: list[str]) -> None:
    """A command that ends by itself."""
    show(arguments)
    status = subprocess.run([*VVUPIPE, *arguments], check=False).returncode
    if status:
        sys.exit(status)


def file_sha256(path: Path) -> str:
    """Digest of the image as the host sees it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sibling_sha256(socket: str) -> str:
    """Digest of the disk as the sibling reads it, through virtqueues in its own RAM."""
    import json

    arguments = ["run", "--vhost-user-blk", socket, "--sha256", "--json"]
    show(arguments)
    finished = subprocess.run([*VVUPIPE, *arguments], check=False, capture_output=True, text=True)
    if finished.returncode:
        sys.exit(finished.stderr or finished.returncode)
    return str(json.loads(finished.stdout)["sha256"])


def _above_0(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number above 0")
    return int(text)


def main() -> int:
    """Run the demonstration; 0 when the sibling read what the image holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=_above_0, default=256, metavar="MiB", help="size of the demonstration disk")
    parser.add_argument("--seconds", type=_above_0, default=3, help="how long each workload runs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vvupipe-demo-") as folder:
        os.environ["XDG_RUNTIME_DIR"] = folder
        image, socket = Path(folder) / "disk.img", f"{folder}/vhost-user.socket"
        say(f"A disk image of {options.size} MiB")
        make_image(image, options.size)
        print(f"  {image}")
        say("Device VM with a VVU proxy function, and the block back-end that drives it by VFIO")
        with (
            running(["run", "--vvu-proxy", f"{socket},addr={ADDRESS}", "--name", "device-vm"]),
            running(["device", "block", "--vfio", ADDRESS, "--file", str(image)]),
        ):
            run(["lspci", "-s", ADDRESS])
            sibling = ["run", "--vhost-user-blk", socket]
            runtime = ["--runtime", f"{options.seconds}s"]
            say("Sibling VM: random 4 KiB reads of its /dev/vda, 32 in flight")
            run([*sibling, "--workload", "randread", *runtime])
            say("Sibling VM: random 4 KiB writes, 32 in flight")
            run([*sibling, "--workload", "randwrite", *runtime])
            say("sha256 of the whole disk, read by the sibling, and of the image file")
            read = sibling_sha256(socket)
            print(f"  sibling  {read}")
        held = file_sha256(image)
        print(f"  image    {held}")
        say("Equal." if read == held else "DIFFERENT: the sibling did not read what the image holds.")
        return int(read != held)


if __name__ == "__main__":
    demonstration.run(main, "demo")
